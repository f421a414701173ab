"""Continuous batching: sequences join and leave between decode steps, and a long prompt is read in chunks.

The tokens and log-probabilities of a request do not depend on the requests beside it, bit for bit on a CPU.

Shapes: B sequences, V vocab_size.
"""

import math
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from smolseek.errors import SmolseekError
from smolseek.generate.cpu_decode import MAX_BATCH
from smolseek.generate.engine import NOT_FINITE, StopReason, check_request
from smolseek.generate.paged_decoder import Experts, PagedDecoder, by_token
from smolseek.generate.prefix_cache import Node, PrefixCache
from smolseek.generate.request import SAMPLING_FAILED, Finished, NewToken, QueueFull, Request, Stats, Top
from smolseek.generate.sampling import Sampler
from smolseek.model.paged_cache import PAGE, PagedCache, pages_for
from smolseek.model.transformer import CausalLM


@dataclass(eq=False)
class _Sequence:
    """A request in the queue or in the batch."""

    id: int
    request: Request
    sampler: Sampler
    pages: list[int] = field(default_factory=list)
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The pages as a tensor."""
    length: int = 0
    """Number of cached tokens."""
    path: list[Node] = field(default_factory=list)
    """The nodes of the prefix cache with which the sequence begins."""
    cached_tokens: int = 0
    """Number of prompt tokens that were in the prefix cache."""
    new: int = 0
    """Number of new tokens."""
    prompt_experts: list[Experts] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, Top]] = field(default_factory=list)


class Scheduler:
    """Continues many requests at the same time.

    All methods are called from one thread. Requests start in the order of their submission. Each reserves the pages for
    its prompt and all its new tokens before it starts, so a sequence that has started always ends.

    Args:
        model: the model, in the number format in which it computes.
        max_sequences: largest number of sequences that are read or written at the same time, at most 512.
        cache_tokens: number of tokens that the cache can hold, for all sequences together.
        chunk: number of prompt tokens that are read between two decode steps, a multiple of the page size 64.
        max_queue: largest number of waiting requests.
        fill_cache: use the memory of the complete cache now. Otherwise a CPU's memory is used when tokens are cached.

    Raises:
        SmolseekError: for a number out of range.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_sequences: int = 32,
        cache_tokens: int = 65536,
        chunk: int = 128,
        max_queue: int = 256,
        fill_cache: bool = True,
    ) -> None:
        for name, value in {
            "max_sequences": max_sequences,
            "cache_tokens": cache_tokens,
            "max_queue": max_queue,
        }.items():
            if value < 1:
                raise SmolseekError(f"{name} {value} must be 1 or more")
        if max_sequences > MAX_BATCH:
            raise SmolseekError(f"max_sequences {max_sequences} must be at most {MAX_BATCH}")
        if chunk < PAGE or chunk % PAGE:
            raise SmolseekError(f"chunk {chunk} is no multiple of {PAGE}: use 128")
        weight = model.lm_head.weight
        self.model = model
        self._max_sequences, self._max_queue, self._chunk = max_sequences, max_queue, chunk
        pages = pages_for(cache_tokens)
        self._cache = PagedCache(model.config, pages, dtype=weight.dtype, device=weight.device, fill=fill_cache)
        self._prefixes = PrefixCache(self._cache, chunk)
        self._decoder = PagedDecoder(model, self._cache)
        self._waiting: deque[_Sequence] = deque()
        self._reading: _Sequence | None = None
        self._writing: list[_Sequence] = []
        self._events: list[NewToken | Finished] = []
        self._submitted = self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to report."""
        return not (self._waiting or self._reading or self._writing or self._events)

    @property
    def cache_bytes(self) -> int:
        """Number of bytes of the cache."""
        return self._cache.nbytes

    @property
    def stats(self) -> Stats:
        """The numbers for monitoring."""
        return Stats(
            running=len(self._writing) + (self._reading is not None),
            waiting=len(self._waiting),
            cache_tokens_used=(self._cache.pages - self._free_pages) * PAGE,
            cache_tokens_reusable=self._prefixes.unused_pages * PAGE,
            cache_tokens_total=self._cache.pages * PAGE,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
        )

    def submit(self, request: Request) -> int:
        """Put a request into the queue. Return the number of its sequence.

        Raises:
            QueueFull: if `max_queue` requests wait already.
            SmolseekError: for a prompt that cannot be continued, and for a request that never fits into the cache.
        """
        prompt, sampling = request.prompt, request.sampling
        check_request(self.model, [[*prompt, *sampling.prefix] if prompt else []], request.max_tokens)
        pages = self._pages(request)
        if pages > self._cache.pages:
            raise SmolseekError(
                f"the prompt of {len(prompt)} tokens and its new tokens need {pages * PAGE} tokens of the cache, which "
                f"holds {self._cache.pages * PAGE}: lower max_tokens, shorten the prompt, or enlarge the cache"
            )
        if len(self._waiting) >= self._max_queue:
            raise QueueFull(f"{self._max_queue} requests are waiting already: try again later")
        sequence = _Sequence(self._submitted, request, Sampler(sampling, prompt, request.stop_ids))
        self._submitted += 1
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, sequence: int, reason: StopReason = "cancelled") -> None:
        """End a sequence before its next token; nothing happens if it has ended. The next `step` reports the end."""
        for one in (*self._waiting, *([self._reading] if self._reading else []), *self._writing):
            if one.id == sequence:
                self._finish(one, reason)

    def step(self) -> list[NewToken | Finished]:
        """Start requests, read at most one chunk of one prompt, and decode one token of all sequences that write."""
        now = time.monotonic()
        for one in (*self._waiting, *([self._reading] if self._reading else []), *self._writing):
            if one.request.deadline is not None and now >= one.request.deadline:
                self._finish(one, "time")
        writing = list(self._writing)  # without the sequence whose prompt ends in this step
        if self._reading is None:
            self._start()
        if self._reading is not None:
            self._read(self._reading)
        if writing:
            self._write(writing)
        events, self._events = self._events, []
        return events

    def _limit(self, request: Request) -> int:
        """Return the largest number of tokens of a request's sequence."""
        context, most = self.model.config.max_position_embeddings, request.max_tokens
        return context if most is None else min(context, len(request.prompt) + most)

    def _pages(self, request: Request) -> int:
        """Return the number of pages of a request's sequence, whose last token is never cached."""
        return pages_for(self._limit(request) - 1)

    def _start(self) -> None:
        """Begin with the first request of the queue, if there are pages for it."""
        if not self._waiting or len(self._writing) >= self._max_sequences:
            return
        sequence = self._waiting[0]
        # The log-probabilities of the prompt need its logits, so the prompt is read completely.
        path = [] if sequence.request.prompt_logprobs else self._prefixes.match(sequence.request.prompt)
        shared = [page for node in path for page in node.pages]
        new = self._pages(sequence.request) - len(shared)
        if new > self._free_pages:
            self._prefixes.release(path)
            return
        self._prefixes.evict(new)
        self._cache.share(shared)
        self._set_pages(sequence, shared + self._cache.allocate(new))
        sequence.path, sequence.length = path, len(shared) * PAGE
        sequence.cached_tokens = sequence.length
        self._reading = self._waiting.popleft()

    @property
    def _free_pages(self) -> int:
        """Number of pages that no running sequence uses."""
        return self._cache.free + self._prefixes.unused_pages

    def _set_pages(self, sequence: _Sequence, pages: list[int]) -> None:
        sequence.pages, sequence.table = pages, torch.tensor(pages, dtype=torch.int64)

    def _remember_chunk(self, sequence: _Sequence, start: int, end: int) -> None:
        """Put a chunk that was read into the prefix cache."""
        first, last = start // PAGE, pages_for(end)
        pages = sequence.pages[first:last]
        remembered = self._prefixes.insert_chunk(sequence.path, sequence.request.prompt[start:end], pages)
        if remembered != pages:
            self._cache.share(remembered)
            self._cache.release(pages)
            self._set_pages(sequence, sequence.pages[:first] + remembered + sequence.pages[last:])

    def _read(self, sequence: _Sequence) -> None:
        """Read the next chunk of a prompt, and sample the first token after the last chunk."""
        request, start = sequence.request, sequence.length
        prompt = request.prompt
        # Chunks begin at multiples of the chunk size, so that the bits do not depend on where reading began.
        end = min((start // self._chunk + 1) * self._chunk, len(prompt))
        last, detailed = end == len(prompt), request.routing or request.prompt_logprobs
        logits_V = None
        if last or not detailed:
            logits_V = self._decoder.read(sequence.table, start, prompt[start:end], logits=last)
        if detailed:
            details = self._decoder.read_details(sequence.table, start, prompt[start:end])
            sequence.prompt_experts += details.experts
            if request.prompt_logprobs:
                # The logits after a token are for the next token.
                for row_V, token in zip(details.logits_TV, prompt[start + 1 : end + 1], strict=False):
                    total = float(row_V.logsumexp(dim=-1))
                    scored = float(row_V[token]) - total, _top(row_V, total, request.top_logprobs)
                    sequence.prompt_logprobs.append(scored)
        sequence.length = end
        self._remember_chunk(sequence, start, end)
        if logits_V is not None:
            self._reading = None
            self._writing.append(sequence)
            self._prompt_tokens += len(prompt)
            self._cached_tokens += sequence.cached_tokens
            (best,), (total,) = self._decoder.summarise(logits_V[None])
            self._sample(sequence, logits_V, best, total, sequence.prompt_experts[-1] if request.routing else None)

    def _write(self, sequences: Sequence[_Sequence]) -> None:
        """Decode one token of each sequence."""
        tables, lengths = [one.table for one in sequences], [one.length for one in sequences]
        tokens = [one.sampler.ids[-1] for one in sequences]
        routing = any(one.request.routing for one in sequences)
        logits_BV, experts_LBK = self._decoder.step(tables, lengths, tokens, experts=routing)
        best_B, total_B = self._decoder.summarise(logits_BV)
        for number, sequence in enumerate(sequences):
            sequence.length += 1
            experts = None
            if experts_LBK is not None and sequence.request.routing:
                (experts,) = by_token(experts_LBK[:, number : number + 1])
            self._sample(sequence, logits_BV[number], best_B[number], total_B[number], experts)

    def _sample(
        self, sequence: _Sequence, logits_V: torch.Tensor, best: int, total: float, experts: Experts | None
    ) -> None:
        """Sample and report the next token of a sequence, or its end.

        `best` is the likeliest token, `total` the logsumexp of the logits.
        """
        request, sampler = sequence.request, sequence.sampler
        if not math.isfinite(total):
            return self._finish(sequence, "error", NOT_FINITE)
        forced = request.sampling.prefix[sequence.new : sequence.new + 1]
        try:
            token = forced[0] if forced else best if sampler.greedy else sampler.sample(logits_V)
        except SmolseekError as error:
            return self._finish(sequence, "error", str(error))
        except Exception as error:  # of a processor, or a bug: the other sequences go on
            traceback.print_exception(error)
            return self._finish(sequence, "error", SAMPLING_FAILED)
        if token in request.stop_ids and not forced:
            return self._finish(sequence, "stop_token")
        prompt_details = _prompt_details(sequence)
        sampler.ids.append(token)
        sequence.new += 1
        self._completion_tokens += 1
        self._events.append(
            NewToken(
                sequence.id,
                token,
                float(logits_V[token]) - total,
                _top(logits_V, total, request.top_logprobs),
                experts,
                *prompt_details,
            )
        )
        if request.max_tokens is not None and sequence.new >= request.max_tokens:
            return self._finish(sequence, "length")
        if len(sampler.ids) >= self._limit(request):
            return self._finish(sequence, "context")
        return None

    def _finish(self, sequence: _Sequence, reason: StopReason, error: str | None = None) -> None:
        """Remove a sequence, release its pages and report its end."""
        if sequence is self._reading:
            self._reading = None
        elif sequence in self._writing:
            self._writing.remove(sequence)
        else:
            self._waiting.remove(sequence)
        prompt = len(sequence.request.prompt)
        if reason != "error":
            cached = sequence.sampler.ids[: sequence.length]
            self._prefixes.insert_pages(sequence.path, cached, sequence.pages, prompt)
        self._prefixes.release(sequence.path)
        self._cache.release(sequence.pages)
        self._events.append(
            Finished(
                sequence.id,
                reason,
                prompt,
                sequence.cached_tokens,
                sequence.new,
                error,
                *_prompt_details(sequence),
            )
        )


def _prompt_details(
    sequence: _Sequence,
) -> tuple[tuple[Experts, ...] | None, tuple[tuple[float, Top], ...] | None]:
    """Return the experts and the log-probabilities of the prompt, where they are requested and were not reported."""
    request, new = sequence.request, sequence.new
    experts = tuple(sequence.prompt_experts) if request.routing and not new else None
    logprobs = tuple(sequence.prompt_logprobs) if request.prompt_logprobs and not new else None
    return experts, logprobs


def _top(logits_V: torch.Tensor, total: float, count: int) -> Top:
    """Return the `count` likeliest tokens; `total` is the logsumexp of the logits."""
    if not count:
        return ()
    best = logits_V.topk(min(count, len(logits_V)))
    return tuple(
        (token, logit - total) for token, logit in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
