"""One request of a scheduler, with the methods of a `Generator`."""

import time
from collections.abc import Iterator, Sequence

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Result, StopReason, Token
from smolseek.generate.request import Finished, Request
from smolseek.generate.scheduler import Scheduler


class ScheduledSequence:
    """Continues a request on a scheduler that has no other request. The scheduler's prefix cache shortens the prompt.

    The scheduler gets the request when the first token is asked for. If not all tokens are read, the request ends when
    this object is deleted.

    Args:
        scheduler: the scheduler.
        request: the request.

    Raises:
        SmolseekError: by the first token, as `Scheduler.submit`, and if the scheduler has another request.
    """

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self.results = [Result(prompt_tokens=len(request.prompt), cache_bytes=scheduler.cache_bytes)]
        self._reasons: list[StopReason] = []
        self._tokens = _generate(scheduler, request, self.results[0], self._reasons)

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, sequence: int) -> None:
        """End the sequence after its newest token, with the stop reason "stop_string"."""
        self._reasons.append("stop_string")

    def cancel(self) -> None:
        """End the sequence before its next token. This method may be called from another thread."""
        self._reasons.append("cancelled")


def _generate(scheduler: Scheduler, request: Request, result: Result, reasons: Sequence[StopReason]) -> Iterator[Token]:
    """Yield the tokens, and fill `result`. `reasons` gets a stop reason if the caller ends the sequence.

    This is no method, since a generator that refers to the object that has it is not closed as soon as the object is
    deleted.
    """
    if not scheduler.idle:
        raise SmolseekError("the scheduler has another request: first read its stream to the end, or delete the stream")
    start, decoding = time.perf_counter(), None
    number = scheduler.submit(request)
    try:
        while result.stop_reason is None:
            if reasons:
                scheduler.cancel(number, reasons[0])
            for event in scheduler.step():
                if decoding is None:
                    decoding = time.perf_counter()
                    result.prompt_seconds = decoding - start
                result.decode_seconds = time.perf_counter() - decoding
                if isinstance(event, Finished):
                    result.stop_reason = "stop_string" if "stop_string" in reasons else event.reason
                    if event.error is not None:
                        raise SmolseekError(event.error)
                else:
                    result.tokens.append(event.id)
                    result.logprobs.append(event.logprob)
                    yield Token(0, event.id, event.logprob)
    finally:
        if result.stop_reason is None:  # the rest is not read
            scheduler.cancel(number)
            scheduler.step()
