"""Samples the next token from the logits. The options have the meaning and the order that they have in transformers.

Shapes: V vocab_size, T tokens so far (prompt and new), C candidates that may still be drawn.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolseek.config import SamplingOptions
from smolseek.device import capability
from smolseek.errors import SmolseekError

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Called like transformers' LogitsProcessor with token ids [1, T] and scores [1, V]; returns new scores [1, V]."""

NO_TOKEN_LEFT = "no token is left to sample: remove a bad word, a stop token before min_tokens, or a penalty"

# The tokens that top_p keeps are nearly always among the 1,024 likeliest tokens. The full vocabulary is sorted only for
# flatter distributions.
_ENOUGH = 1024


@dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingOptions):
    """Sampling parameters of one sequence. Words and prefix, which are text in the Python interface, are token ids."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never generated."""
    prefix: tuple[int, ...] = ()
    """Tokens that the continuation begins with."""
    processors: tuple[Processor, ...] = ()
    """Additional functions, for example transformers' LogitsProcessor objects; they run after the penalties."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not word for word in self.bad_words):
            raise SmolseekError("bad words has an empty entry: leave out this entry")


def processors(sampling: SamplingParams, prompt: int, stop_ids: Collection[int]) -> list[Processor]:
    """Return the functions that change the logits before sampling, in transformers' order. Usually the list is empty.

    Args:
        sampling: the options.
        prompt: number of the prompt's tokens.
        stop_ids: tokens that may not be sampled before `min_tokens` new tokens.
    """
    chain: list[Processor] = []
    if sampling.presence_penalty or sampling.frequency_penalty:
        chain.append(_penalty(sampling, prompt))
    if sampling.repetition_penalty != 1:
        chain.append(_transformers("RepetitionPenalty", float(sampling.repetition_penalty)))
    if chain:  # huge penalties together overflow
        chain.append(lambda ids_1T, scores_1V: scores_1V.clamp(max=1e30))
    if sampling.no_repeat_ngram:
        chain.append(_transformers("NoRepeatNGram", sampling.no_repeat_ngram))
    if sampling.bad_words:
        chain.append(_transformers("NoBadWords", [list(word) for word in sampling.bad_words], None))
    if sampling.min_tokens and stop_ids:
        chain.append(_transformers("MinNewTokensLength", prompt, sampling.min_tokens, sorted(stop_ids), "cpu"))
    return chain + list(sampling.processors)


def _transformers(name: str, *arguments: Any) -> Processor:
    """Return a logits processor of transformers. The import is here because sampling usually needs no processor."""
    from transformers.generation import logits_process

    return getattr(logits_process, f"{name}LogitsProcessor")(*arguments)


def _penalty(sampling: SamplingParams, prompt: int) -> Processor:
    """Return the presence and frequency penalties of OpenAI's API, which count only new tokens, not the prompt."""

    def apply(ids_1T: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        new, counts = ids_1T[0, prompt:].unique(return_counts=True)
        penalty = sampling.presence_penalty + sampling.frequency_penalty * counts.to(scores_1V.dtype)
        return scores_1V.index_add(1, new.to(scores_1V.device), -penalty.to(scores_1V.device)[None])

    return apply


def candidates(logits_V: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [C] and ids [C] of the tokens that may be drawn, after the temperature and the filters."""
    raw_V = logits_V.float()
    logits = raw_V / sampling.temperature
    # With a very low temperature the quotient may overflow float32.
    if sampling.temperature < 1e-3 and not logits.isfinite().all():
        logits = (raw_V - raw_V.max()).double() / sampling.temperature
    ids = torch.arange(len(logits), device=logits.device)
    if sampling.top_k is not None and sampling.top_k < len(logits):
        # Tokens as likely as the k-th token are kept, too, as in transformers.
        ids = (logits >= logits.topk(sampling.top_k, sorted=False).values.min()).nonzero()[:, 0]
        logits = logits[ids]
    if sampling.top_p is not None and sampling.top_p < 1:
        logits, ids = _nucleus(logits, ids, sampling.top_p)
    if sampling.min_p:
        p = logits.softmax(dim=-1)
        likely = p >= sampling.min_p * p.max()
        logits, ids = logits[likely], ids[likely]
    if sampling.typical_p is not None and sampling.typical_p < 1:
        logits, ids = _typical(logits, ids, sampling.typical_p)
    return logits, ids


def _nucleus(logits: torch.Tensor, ids: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = logits.logsumexp(dim=-1)
    for count in (_ENOUGH, len(logits)):
        best = logits.topk(min(count, len(logits)))
        p = (best.values - total).exp()
        before = p.cumsum(dim=-1) - p
        if before[-1] >= top_p:
            break
    # A token is removed if the likelier tokens already add up to top_p. The likeliest token is always kept.
    inside = before < top_p
    return best.values[inside], ids[best.indices[inside]]


def _typical(logits: torch.Tensor, ids: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum()
    order = (-log_p - entropy).abs().sort().indices
    typical = order[: 1 + int((p[order].cumsum(dim=-1) < mass).sum())]
    return logits[typical], ids[typical]


class Sampler:
    """Samples the tokens of one sequence with its own random generator; `ids` are the sequence's tokens so far.

    Args:
        sampling: the options.
        prompt: the prompt's tokens.
        stop_ids: tokens that end the sequence.
    """

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], stop_ids: Collection[int]) -> None:
        self.sampling = sampling
        self.ids = list(prompt)
        self.processors = processors(sampling, len(prompt), stop_ids)
        self.generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def greedy(self) -> bool:
        """Whether `sample` returns the token with the largest logit."""
        return self.sampling.temperature == 0 and not self.processors

    def sample(self, logits_V: torch.Tensor) -> int:
        """Return the next token for `logits_V`.

        Raises:
            SmolseekError: if the options forbid every token.
        """
        if not capability(logits_V.device).float64:  # `candidates` may need it
            logits_V = logits_V.cpu()
        if self.processors:
            ids_1T, scores_1V = torch.tensor([self.ids]), logits_V.float()[None].cpu()
            for processor in self.processors:
                scores_1V = processor(ids_1T, scores_1V)
            logits_V = scores_1V[0]
            if logits_V.max() == -torch.inf:  # the filters would keep no token, and `argmax` would take a banned token
                raise SmolseekError(NO_TOKEN_LEFT)
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        logits_C, ids_C = candidates(logits_V, self.sampling)
        return int(ids_C[self._draw(logits_C.softmax(dim=-1).cpu())])

    def _draw(self, p_C: torch.Tensor) -> int:
        """Return an index with the probabilities `p_C`: where the cumulative sum exceeds a random number.

        `torch.multinomial` takes several times longer, since it draws a random number for each candidate.
        """
        sum_C = p_C.cumsum(dim=-1, dtype=torch.float64)
        threshold = torch.rand(1, dtype=torch.float64, generator=self.generator) * sum_C[-1]
        index = int(torch.searchsorted(sum_C, threshold, right=True))
        return index if index < len(p_C) else int(p_C.nonzero()[-1])  # the product was rounded up
