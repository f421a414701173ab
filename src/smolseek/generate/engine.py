"""The engine: generates tokens for one sequence, or for a batch of sequences of different lengths.

Shapes: B sequences that are still generating, T tokens of a prompt, D hidden_size, V vocab_size.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from smolseek.device import capability
from smolseek.errors import SmolseekError
from smolseek.generate.cpu_decode import CHUNK, bind
from smolseek.generate.sampling import Sampler, SamplingParams
from smolseek.generate.static import StaticStep
from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM

StopReason = Literal["stop_token", "stop_string", "length", "context", "time", "cancelled", "error"]
NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for their number format: "
    "try --dtype float32, or use another checkpoint"
)


class Decoder:
    """A model with a preallocated KV cache for a batch of sequences. Each step decodes one token of every sequence.

    On a CPU a step runs cpu_decode.c, if it can be built. On a GPU a step replays a CUDA graph. The
    model's forward pass reads prompts, and runs all other steps.

    Args:
        model: the model, in the number format in which it computes.
        batch: number of sequences.
        capacity: number of tokens of each sequence that the cache can hold.
    """

    def __init__(self, model: CausalLM, batch: int, capacity: int) -> None:
        weight = model.lm_head.weight
        self.model, self.device = model, weight.device
        self.cache = Cache(model.config, batch, capacity, dtype=weight.dtype, device=weight.device)
        self.lengths = [0] * batch
        self.cpu = bind(model, self.cache.layers, capacity, batch)
        self._first_BX = torch.arange(batch)[:, None] * capacity + torch.arange(0, capacity, CHUNK)
        self.static = StaticStep(model, self.cache) if capability(weight.device).cuda_graphs and capacity > 1 else None

    @torch.inference_mode()
    def prefill(self, sequence: int, ids: Sequence[int], logits: int = 1) -> torch.Tensor:
        """Read a prompt into an empty cache entry. Return the logits [logits, V] after its last tokens, in float32."""
        ids_1T = torch.tensor([list(ids)], device=self.device)
        hidden_XD = self.model.hidden(ids_1T, self.cache.entry(sequence), last=logits).hidden_BTD[0]
        self.lengths[sequence] = len(ids)
        return self.cpu.head(hidden_XD) if self.cpu is not None else self.model.lm_head(hidden_XD).float()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each sequence. Return the logits [B, V] after the appended tokens, in float32."""
        assert len(tokens) == len(self.lengths)
        if self.cpu is not None:
            first_BX = self._first_BX[: len(tokens)]
            logits_BV, _ = self.cpu.step(torch.tensor(tokens), torch.tensor(self.lengths), first_BX)
        elif self.static is not None:
            logits_BV = self.static.step(tokens, self.lengths)
        else:
            self.cache.set_lengths(self.lengths)
            ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
            logits_BV = self.model(ids_B1, self.cache)[:, 0].float()
        self.lengths = [length + 1 for length in self.lengths]
        return logits_BV

    @torch.inference_mode()
    def reorder_cache(self, sequences: Sequence[int]) -> None:
        """Make the batch consist of the numbered sequences. A sequence may be repeated or left out."""
        self.cache.length = max(self.lengths)
        self.cache.reorder(sequences)
        self.lengths = [self.lengths[sequence] for sequence in sequences]


@dataclass
class Result:
    """The tokens generated after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """The new tokens, without the stop token."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token in nats, before penalties, temperature and filters."""
    stop_reason: StopReason | None = None
    """Why the sequence ended; None until it ends."""
    prompt_tokens: int = 0
    """Number of tokens of the prompt."""
    prompt_seconds: float = 0.0
    """Time to read all prompts of the call."""
    decode_seconds: float = 0.0
    """Time from the end of reading the prompts to the end of this sequence."""
    cache_bytes: int = 0
    """Bytes of the cache, for all sequences of the call."""
    score: float | None = None
    """Beam search only: the sum of the log-probabilities divided by length ** length_penalty."""


class Token(NamedTuple):
    """A new token."""

    sequence: int
    """Number of the prompt that the token continues."""
    id: int
    logprob: float
    """As in `Result.logprobs`."""


def check_request(model: CausalLM, prompts: Sequence[Sequence[int]], max_tokens: int | None) -> None:
    """Raise SmolseekError for prompts that cannot be continued, and for a `max_tokens` below 1."""
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for ids in prompts:
        if not ids:
            raise SmolseekError("the prompt is empty: give at least one word")
        if len(ids) >= context:
            raise SmolseekError(
                f"the prompt has {len(ids)} tokens, but the model's context is {context}: shorten the prompt"
            )
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise SmolseekError(
                f"token id {wrong} is not among the model's {vocabulary} tokens: use the model's own tokenizer"
            )
    if max_tokens is not None and max_tokens < 1:
        raise SmolseekError(f"max_tokens {max_tokens} must be 1 or more")


def require_finite(logits_XV: torch.Tensor) -> torch.Tensor:
    """Return the logsumexp [...] of logits [..., V].

    Raises:
        SmolseekError: for logits that are not finite, for example because of damaged weights.
    """
    total_X = logits_XV.logsumexp(dim=-1)
    if not total_X.isfinite().all():
        raise SmolseekError(NOT_FINITE)
    return total_X


class Generator:
    """Continues one or more prompts. A generator is an iterator over new tokens, and also fills `results`.

    The tokens of a sequence do not depend on the other sequences. A sequence leaves the batch as soon as it ends.

    Args:
        model: the model.
        prompts: token ids; equal prompts are read once.
        sampling: sampling parameters for all prompts, or a list of parameters with one entry for each prompt.
        max_tokens: maximum number of new tokens of a sequence; with None the context is the limit.
        stop_ids: tokens that end a sequence; they are not part of the result.
        max_time: seconds after which all sequences end, counted from the request for the first token.

    Raises:
        SmolseekError: for an empty prompt, a prompt longer than the context, or numbers out of range.
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
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        forced = [[*p, *s.prefix] if p else [] for p, s in zip(prompts, samplings, strict=True)]
        check_request(model, forced, max_tokens)
        self._model, self._max_tokens, self._max_time = model, max_tokens, max_time
        self._stop_ids = frozenset(stop_ids)
        self._samplers = [Sampler(s, p, self._stop_ids) for p, s in zip(prompts, samplings, strict=True)]
        self._cancelled, self._stopped = False, set[int]()
        self._tokens = self._generate()
        self.results = [Result(prompt_tokens=len(ids)) for ids in prompts]

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        return next(self._tokens)

    def stop(self, sequence: int) -> None:
        """End a sequence after its newest token, with the stop reason "stop_string"."""
        self._stopped.add(sequence)

    def cancel(self) -> None:
        """End all sequences before their next token. This method may be called from another thread."""
        self._cancelled = True

    def finish(self) -> list[Result]:
        """Generate to the end and return the results."""
        for _ in self:
            pass
        return self.results

    def _generate(self) -> Iterator[Token]:
        start = time.perf_counter()
        decoder, logits = self._prefill()
        decoding = time.perf_counter()
        for result in self.results:
            result.cache_bytes, result.prompt_seconds = decoder.cache.nbytes, decoding - start
        active = list(range(len(self.results)))  # the sequences in the decoder's batch
        while active:
            for sequence, logits_XV in zip(active, logits, strict=True):
                result = self.results[sequence]
                # In the first round there are logits after the prompt and after each token of the forced prefix.
                for logits_V in logits_XV:
                    token, result.stop_reason = self._advance(sequence, logits_V, start)
                    result.decode_seconds = time.perf_counter() - decoding
                    if token is not None:
                        yield token
                    if sequence in self._stopped:
                        result.stop_reason = "stop_string"
                    if result.stop_reason is not None:
                        break
            remaining = [entry for entry, n in enumerate(active) if self.results[n].stop_reason is None]
            if remaining and len(remaining) < len(active):
                decoder.reorder_cache(remaining)
            active = [active[entry] for entry in remaining]
            if active:
                logits = list(decoder.step([self._samplers[n].ids[-1] for n in active])[:, None])

    def _prefill(self) -> tuple[Decoder, list[torch.Tensor]]:
        """Read prompts and forced prefixes. Return a decoder, and the logits [1 + prefix, V] of each sequence."""
        keys = [(tuple(sampler.ids), sampler.sampling.prefix) for sampler in self._samplers]
        context, most = self._model.config.max_position_embeddings, self._max_tokens
        limits = [context if most is None else min(context, len(prompt) + most) for prompt, _ in keys]
        capacity = max(
            max(limit, len(prompt) + len(prefix)) for limit, (prompt, prefix) in zip(limits, keys, strict=True)
        )
        decoder = Decoder(self._model, len(keys), capacity)
        logits: dict[int, torch.Tensor] = {}
        first = [keys.index(key) for key in keys]  # equal prompts are read once, then copied
        for sequence in dict.fromkeys(first):
            prompt, prefix = keys[sequence]
            logits[sequence] = decoder.prefill(sequence, [*prompt, *prefix], len(prefix) + 1)
        decoder.reorder_cache(first)
        return decoder, [logits[sequence] for sequence in first]

    def _advance(self, sequence: int, logits_V: torch.Tensor, start: float) -> tuple[Token | None, StopReason | None]:
        """Sample and record the next token of a sequence. Return the token, and a stop reason if the sequence ends."""
        result, sampler = self.results[sequence], self._samplers[sequence]
        if self._cancelled:
            return None, "cancelled"
        if self._max_time is not None and time.perf_counter() - start >= self._max_time:
            return None, "time"
        total = require_finite(logits_V)
        prefix = sampler.sampling.prefix[len(result.tokens) :]
        token = prefix[0] if prefix else sampler.sample(logits_V)
        if token in self._stop_ids and not prefix:
            return None, "stop_token"
        sampler.ids.append(token)
        result.tokens.append(token)
        result.logprobs.append(float(logits_V[token] - total))
        reason: StopReason | None = None
        if self._max_tokens is not None and len(result.tokens) >= self._max_tokens:
            reason = "length"
        elif len(sampler.ids) >= self._model.config.max_position_embeddings:
            reason = "context"
        return Token(sequence, token, result.logprobs[-1]), reason
