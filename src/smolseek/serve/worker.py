"""The thread that owns the scheduler. It takes requests from the event loop, and gives text back to it."""

import asyncio
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from smolseek.errors import SmolseekError
from smolseek.generate.request import Finished, NewToken, Request, Stats
from smolseek.generate.scheduler import Scheduler
from smolseek.generate.text import Detokenizer
from smolseek.serve.errors import FAILED
from smolseek.serve.metrics import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextRequest:
    """A text to write: a request for the scheduler, and the strings that end the text."""

    request: Request
    stop: tuple[str, ...] = ()
    reports_tokens: bool = False
    """Hand over the tokens, too."""


class Delta(NamedTuple):
    """What is new in one text of a ticket."""

    text_number: int
    text: str
    tokens: tuple[NewToken, ...]
    """The tokens of the text, if the request reports them."""
    end: Finished | None = None
    """Set in the last delta of the text."""

    @property
    def reports_prompt(self) -> bool:
        """Whether log-probabilities or experts of the prompt are in the delta."""
        return any(event.prompt_logprobs or event.prompt_experts for event in (*self.tokens, self.end) if event)


class Ticket:
    """The texts of one request to the server; the worker puts what is new into `deltas`."""

    def __init__(self, texts: Sequence[TextRequest]) -> None:
        self.texts = tuple(texts)
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.submitted = time.monotonic()


@dataclass(eq=False)
class _ActiveText:
    """A text that is waiting or being written."""

    ticket: Ticket
    number: int
    detokenizer: Detokenizer
    reports_tokens: bool
    new: int = 0
    length: int = 0
    """Number of characters that were handed over."""
    pending: deque[tuple[NewToken, int]] = field(default_factory=deque)
    """Tokens that were not handed over, each with the number of characters before it."""

    def tokens(self, text: str, final: bool) -> tuple[NewToken, ...]:
        """Return the tokens that begin in the text up to the end of the new `text`; with `final`, all tokens."""
        self.length += len(text)
        ready = []
        while self.pending and (final or self.pending[0][1] < self.length):
            ready.append(self.pending.popleft()[0])
        return tuple(ready)


class Worker:
    """Runs a scheduler in a thread.

    Args:
        scheduler: the scheduler, which only the thread uses.
        tokenizer: the model's tokenizer.
        metrics: where ends and times are counted.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: "PreTrainedTokenizerFast", metrics: Metrics) -> None:
        self._scheduler, self._tokenizer, self._metrics = scheduler, tokenizer, metrics
        self._commands: queue.SimpleQueue[tuple[Ticket, bool] | None] = queue.SimpleQueue()
        self._active: dict[int, _ActiveText] = {}
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.stats: Stats = scheduler.stats
        """The scheduler's numbers after its last step."""
        self.failure: Exception | None = None
        """The error that has ended the thread, a bug of ours."""

    def start(self) -> None:
        """Start the thread, which hands results to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, texts: Sequence[TextRequest]) -> Ticket:
        """Put all texts of a request into the queue, or none.

        Raises:
            QueueFull: if the queue has no place for all of them.
            SmolseekError: for a request that cannot be carried out.
        """
        ticket = Ticket(texts)
        self._commands.put((ticket, False))
        if self.failure is not None:
            raise self.failure
        try:
            await ticket.accepted
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End the texts of a ticket before their next token; nothing happens to texts that have ended."""
        self._commands.put((ticket, True))

    def stop(self) -> None:
        """End the thread after its step, and wait for it."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                events = self._scheduler.step()
                self.stats = self._scheduler.stats
                self._hand_over(events)
        except Exception as error:
            self._give_up(error)

    def _obey(self) -> bool:
        """Carry out the commands; wait for one if there is nothing else to do. Return False at the end."""
        block = self._scheduler.idle
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            ticket, cancelled = command
            if cancelled:
                for number in [number for number, text in self._active.items() if text.ticket is ticket]:
                    self._scheduler.cancel(number)
            else:
                self._accept(ticket)
            block = False

    def _accept(self, ticket: Ticket) -> None:
        numbers: list[int] = []
        try:
            for text in ticket.texts:
                numbers.append(self._scheduler.submit(text.request))
        except Exception as error:
            for number in numbers:
                self._scheduler.cancel(number)
            self._call(_resolve, ticket.accepted, error)
            if isinstance(error, SmolseekError):
                return
            raise
        for place, (number, text) in enumerate(zip(numbers, ticket.texts, strict=True)):
            detokenizer = Detokenizer(self._tokenizer, text.stop)
            self._active[number] = _ActiveText(ticket, place, detokenizer, text.reports_tokens)
        self._call(_resolve, ticket.accepted, None)

    def _hand_over(self, events: Sequence[NewToken | Finished]) -> None:
        """Turn the events of a step into text, and give the text to the event loop."""
        deltas: list[tuple[Ticket, Delta]] = []
        for event in events:
            active = self._active.get(event.sequence)
            if active is None:  # a text of a request that was refused
                continue
            delta = self._end(active, event) if isinstance(event, Finished) else self._advance(active, event)
            if delta.text or delta.tokens or delta.end:
                deltas.append((active.ticket, delta))
        if deltas:
            self._call(_deliver, deltas)

    def _advance(self, active: _ActiveText, token: NewToken) -> Delta:
        if active.new == 0:
            self._metrics.count_first_token(time.monotonic() - active.ticket.submitted)
        active.new += 1
        before = active.detokenizer.length
        text = active.detokenizer.push(token.id)
        if active.detokenizer.stopped:
            self._scheduler.cancel(token.sequence, "stop_string")
        if not active.reports_tokens:
            return Delta(active.number, text, ())
        active.pending.append((token, before))
        return Delta(active.number, text, active.tokens(text, final=False) if text else ())

    def _end(self, active: _ActiveText, end: Finished) -> Delta:
        del self._active[end.sequence]
        text = active.detokenizer.finish()
        if active.detokenizer.stopped:  # perhaps in the last token before another reason
            end = end._replace(reason="stop_string")
        self._metrics.count_end(end.reason)
        # The tokens of a stop string are not a part of the text.
        tokens = active.tokens(text, final=not active.detokenizer.stopped)
        if active.pending:  # perhaps the first token, which reports the prompt
            first, _ = active.pending[0]
            end = end._replace(prompt_experts=first.prompt_experts, prompt_logprobs=first.prompt_logprobs)
        return Delta(active.number, text, tokens, end)

    def _give_up(self, error: Exception) -> None:
        """End all texts and refuse all requests after an error that is a bug of ours."""
        traceback.print_exception(error)
        self.failure = error
        lost = [
            (active.ticket, Delta(active.number, "", (), Finished(number, "error", 0, 0, active.new, FAILED)))
            for number, active in self._active.items()
        ]
        self._call(_deliver, lost)
        while not self._commands.empty():
            if command := self._commands.get():
                self._call(_resolve, command[0].accepted, error)

    def _call(self, function, *arguments) -> None:  # type: ignore[no-untyped-def]
        """Call a function in the thread of the event loop."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _resolve(accepted: asyncio.Future[None], error: Exception | None) -> None:
    if accepted.done():  # the client has gone
        return
    if error is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(error)


def _deliver(deltas: Sequence[tuple[Ticket, Delta]]) -> None:
    for ticket, delta in deltas:
        ticket.deltas.put_nowait(delta)
