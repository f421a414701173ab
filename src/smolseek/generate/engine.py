"""The engine: tokens over a preallocated cache, for one sequence or many of unlike lengths.

Shapes: B sequences that are still being written, T tokens of a prompt, D hidden_size, V vocab_size.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from smolseek.errors import SmolseekError
from smolseek.generate.cpu_decode import bind
from smolseek.generate.sampling import Sampler, SamplingParams
from smolseek.generate.static import StaticStep
from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM

StopReason = Literal["stop_token", "stop_string", "length", "context", "time", "cancelled"]


class Decoder:
    """A model with a cache of rows, one a sequence: reads prompts, then takes one token of each row at a time.

    A step goes through cpu_decode.c on a CPU, where that can be built, and through a CUDA graph on a GPU; prompts and
    all other steps go through the model's forward pass.

    Args:
        model: in the number format it shall compute in.
        rows: sequences.
        capacity: tokens to make room for, in each row.
    """

    def __init__(self, model: CausalLM, rows: int, capacity: int) -> None:
        weight = model.lm_head.weight
        self.model = model
        self.cache = Cache(model.config, rows, capacity, dtype=weight.dtype, device=weight.device)
        self.lengths = [0] * rows
        self.cpu = bind(model, self.cache)
        fixed = weight.device.type == "cuda" and capacity > 1
        self.static = StaticStep(model, self.cache, graph=True) if fixed else None

    @torch.inference_mode()
    def prefill(self, row: int, ids: Sequence[int], logits: int = 1) -> torch.Tensor:
        """Read a prompt into an empty row -> the logits [logits, V] after its last tokens, in float32."""
        ids_1T = torch.tensor([list(ids)], device=self.device)
        logits_XV = self.model(ids_1T, self.cache.row(row), last=logits)[0]
        self.lengths[row] = len(ids)
        return logits_XV.float()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row -> the logits [B, V] after them, in float32."""
        assert len(tokens) == len(self.lengths)
        if self.cpu is not None:
            logits_BV = self.cpu.step(torch.tensor(tokens), torch.tensor(self.lengths))
        elif self.static is not None:
            logits_BV = self.static.step(tokens, self.lengths)
        else:
            self.cache.set_lengths(self.lengths)
            ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
            logits_BV = self.model(ids_B1, self.cache)[:, 0].float()
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    @torch.inference_mode()
    def reorder_cache(self, rows: Sequence[int]) -> None:
        """Make the rows those numbered in `rows`, which may repeat or leave some out."""
        self.cache.length = max(self.lengths)
        self.cache.reorder(rows)
        self.lengths = [self.lengths[row] for row in rows]

    @torch.inference_mode()
    def copy(self, source: int, row: int) -> None:
        """Make `row` hold what `source` holds."""
        for held in self.cache.layers:
            held[row, : self.lengths[source]] = held[source, : self.lengths[source]]
        self.lengths[row] = self.lengths[source]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.lm_head.weight.device


@dataclass
class Result:
    """What was written after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """The new tokens, without the stop token."""
    logprobs: list[float] = field(default_factory=list)
    """Each token's log-probability in the model's own distribution, before any strategy (nats)."""
    stop_reason: StopReason | None = None
    """Why it ended; None while it is being written."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    prompt_seconds: float = 0.0
    """Time spent reading all the prompts of the call."""
    decode_seconds: float = 0.0
    """Time from then to this sequence's end."""
    cache_bytes: int = 0
    """Bytes of the cache of all the sequences of the call."""
    score: float | None = None
    """Beam search: sum of the log-probabilities over length ** length_penalty."""


class Token(NamedTuple):
    """A token as it is written."""

    row: int
    """Number of its prompt."""
    id: int
    logprob: float
    """As in `Result.logprobs`."""


def check_request(model: CausalLM, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> None:
    """Refuse prompts that cannot be continued, and a senseless `max_tokens`, with a SmolseekError."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for ids in prompts:
        if not ids:
            raise SmolseekError("the prompt is empty: give at least one word")
        if len(ids) >= context:
            raise SmolseekError(f"the prompt has {len(ids)} tokens, the model's context {context}: shorten the prompt")
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise SmolseekError(f"token {wrong} is not among the model's {vocabulary}: use the model's own tokenizer")
    if max_tokens is not None and max_tokens < 1:
        raise SmolseekError(f"max-tokens {max_tokens} is below 1: ask for at least one")


def require_finite(logits_XV: torch.Tensor) -> torch.Tensor:
    """Return the logsumexp [...] of logits [..., V].

    Raises:
        SmolseekError: for logits that are no finite numbers, as those of damaged weights.
    """
    total_X = logits_XV.logsumexp(dim=-1)
    if not total_X.isfinite().all():
        raise SmolseekError(
            "the model's logits are not finite: its weights are damaged, or too large for their number format: "
            "try --dtype float32, or take another checkpoint"
        )
    return total_X


class Generator:
    """Continues one or more prompts: an iterator of tokens, with the `results` beside it.

    A row's tokens do not depend on the other rows. Rows that end make room at once.

    Args:
        model: the model.
        prompts: token ids; each prompt is a row. Equal prompts are read once.
        sampling: one strategy for all rows, or one for each.
        max_tokens: new tokens of a row, at most; None goes on to the end of the context.
        stop_ids: tokens that end a row; they are not part of it.
        max_time: seconds after which all rows end, counted from the first token asked for.

    Raises:
        SmolseekError: for an empty prompt, one beyond the context, or numbers out of range.
    """

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        max_tokens: int | None = None,
        *,
        stop_ids: Collection[int] = (),
        max_time: float | None = None,
    ) -> None:
        check_request(model, prompts, max_tokens)
        if max_time is not None and not max_time > 0:
            raise SmolseekError(f"max-time {max_time} must be above 0 seconds")
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        assert len(samplings) == len(prompts)
        check_request(model, [[*p, *s.prefix] for p, s in zip(prompts, samplings, strict=True)], max_tokens)
        self._model, self._prompts, self._samplings = model, [list(ids) for ids in prompts], samplings
        self._max_tokens, self._stop_ids = max_tokens, frozenset(stop_ids)
        self._max_time, self._cancelled, self._stopped = max_time, False, set[int]()
        self._tokens = self._write()
        self.results = [Result(prompt_tokens=len(ids)) for ids in prompts]

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, row: int) -> None:
        """End a row after the token that came last, with "stop_string"."""
        self._stopped.add(row)

    def cancel(self) -> None:
        """End all rows before their next token; may be called from another thread."""
        self._cancelled = True

    def finish(self) -> list[Result]:
        """Generate to the end and return the results."""
        for _ in self:
            pass
        return self.results

    def _write(self) -> Iterator[Token]:
        model, context = self._model, self._model.config.max_position_embeddings
        begun = time.perf_counter()
        limit = max(self._end(row) for row in range(len(self._prompts)))
        decoder = Decoder(model, len(self._prompts), min(limit, context))
        logits, samplers = self._read(decoder)
        read = time.perf_counter()
        for result in self.results:
            result.cache_bytes, result.prompt_seconds = decoder.cache.nbytes, read - begun
        rows = list(range(len(self._prompts)))  # the prompt of each of the decoder's rows
        while rows:
            kept: list[int] = []
            for place, row in enumerate(rows):
                # The first logits of a row are those after the prompt and after each token of its forced prefix.
                reason: StopReason | None = None
                for logits_V in logits[place]:
                    token, reason = self._advance(row, samplers[row], logits_V, begun)
                    self.results[row].decode_seconds = time.perf_counter() - read
                    if token is not None:
                        yield token
                    if row in self._stopped:
                        reason = "stop_string"
                    if reason is not None:
                        break
                self.results[row].stop_reason = reason
                if reason is None:
                    kept.append(place)
            if len(kept) < len(rows):
                rows = [rows[place] for place in kept]
                if rows:
                    decoder.reorder_cache(kept)
            if rows:
                logits = list(decoder.step([samplers[row].ids[-1] for row in rows])[:, None])

    def _advance(
        self, row: int, sampler: Sampler, logits_V: torch.Tensor, begun: float
    ) -> tuple[Token | None, StopReason | None]:
        """Choose and note the next token of a row; return it, if there is one, and why the row ends, if it does."""
        result, prefix = self.results[row], sampler.sampling.prefix
        if self._cancelled:
            return None, "cancelled"
        if self._max_time is not None and time.perf_counter() - begun >= self._max_time:
            return None, "time"
        total = require_finite(logits_V)
        if len(result.tokens) < len(prefix):
            token = prefix[len(result.tokens)]
        else:
            token = sampler.sample(logits_V)
            if token in self._stop_ids:
                return None, "stop_token"
        sampler.append(token)
        written = Token(row, token, float(logits_V[token] - total))
        result.tokens.append(token)
        result.logprobs.append(written.logprob)
        if self._max_tokens is not None and len(result.tokens) >= self._max_tokens:
            return written, "length"
        if len(sampler.ids) >= self._model.config.max_position_embeddings:
            return written, "context"
        return written, None

    def _end(self, row: int) -> int:
        """Return how long a row may become."""
        context, prompt = self._model.config.max_position_embeddings, self._prompts[row]
        most = context if self._max_tokens is None else len(prompt) + self._max_tokens
        return max(min(most, context), len(prompt) + len(self._samplings[row].prefix))

    def _read(self, decoder: Decoder) -> tuple[list[torch.Tensor], list[Sampler]]:
        """Read the prompts, with the forced prefixes; a prompt that came before is copied from its row."""
        logits: list[torch.Tensor] = []
        samplers = []
        seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        for row, (prompt, sampling) in enumerate(zip(self._prompts, self._samplings, strict=True)):
            key = (tuple(prompt), sampling.prefix)
            if key in seen:
                decoder.copy(seen[key], row)
                logits.append(logits[seen[key]])
            else:
                seen[key] = row
                logits.append(decoder.prefill(row, [*prompt, *sampling.prefix], len(sampling.prefix) + 1))
            samplers.append(Sampler(sampling, prompt, self._stop_ids))
        return logits, samplers
