"""One request of a scheduler, with the methods of a `Generator`."""

import time
from collections.abc import Iterator

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Result, Token
from smolseek.generate.request import Finished, Request
from smolseek.generate.scheduler import Scheduler


class ScheduledSequence:
    """Continues a request on a scheduler that has no other request. The scheduler's prefix cache shortens the prompt.

    Args:
        scheduler: an idle scheduler.
        request: the request.

    Raises:
        SmolseekError: as `Scheduler.submit`, and if the scheduler has another request.
    """

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        if not scheduler.idle:
            raise SmolseekError("the scheduler has another request: read its stream to the end, or cancel it first")
        self._scheduler, self._number = scheduler, scheduler.submit(request)
        self._cancelled, self._stopped = False, False
        self.results = [Result(prompt_tokens=len(request.prompt), cache_bytes=scheduler.cache_bytes)]
        self._tokens = self._generate()

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, sequence: int) -> None:
        """End the sequence after its newest token, with the stop reason "stop_string"."""
        self._stopped = True
        self._scheduler.cancel(self._number, "stop_string")

    def cancel(self) -> None:
        """End the sequence before its next token. This method may be called from another thread."""
        self._cancelled = True

    def _generate(self) -> Iterator[Token]:
        (result,), start, decoding = self.results, time.perf_counter(), None
        while result.stop_reason is None:
            if self._cancelled:
                self._scheduler.cancel(self._number)
            for event in self._scheduler.step():
                if decoding is None:
                    decoding = time.perf_counter()
                    result.prompt_seconds = decoding - start
                result.decode_seconds = time.perf_counter() - decoding
                if isinstance(event, Finished):
                    result.stop_reason = "stop_string" if self._stopped else event.reason
                    if event.error is not None:
                        raise SmolseekError(event.error)
                else:
                    result.tokens.append(event.id)
                    result.logprobs.append(event.logprob)
                    yield Token(0, event.id, event.logprob)
