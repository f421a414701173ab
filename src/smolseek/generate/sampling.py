"""How the next token is picked from the logits: strategies, with the semantics and the order of transformers.

Shapes: V vocab_size, T tokens so far (prompt and new), C candidates that are still in the draw.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from smolseek.errors import SmolseekError
from smolseek.sampling_options import SamplingOptions

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""As transformers' LogitsProcessor: token ids [1, T] and scores [1, V] -> new scores [1, V]."""

# A nucleus is nearly always among so many; only a flatter distribution needs the whole vocabulary sorted.
_ENOUGH = 1024


@dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingOptions):
    """A strategy with what is told in tokens."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never written."""
    prefix: tuple[int, ...] = ()
    """Tokens that the continuation begins with."""
    processors: tuple[Processor, ...] = ()
    """Your own, for example transformers' LogitsProcessor objects; they come after the penalties."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not word for word in self.bad_words):
            raise SmolseekError("bad words: one of them is empty: leave it out")


def processors(sampling: SamplingParams, prompt: int, stop_ids: Collection[int]) -> list[Processor]:
    """Return what changes the logits before the draw, in transformers' order; empty in the usual case.

    Args:
        sampling: the strategy.
        prompt: tokens of the prompt.
        stop_ids: the tokens that `min_tokens` holds back.
    """
    found: list[Processor] = []
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(_penalty(sampling, prompt))
    needs_stop = bool(sampling.min_tokens and stop_ids)
    if sampling.repetition_penalty != 1 or sampling.no_repeat_ngram or sampling.bad_words or needs_stop:
        # Imported here: a plain draw does without these classes.
        from transformers.generation import logits_process as hf

        if sampling.repetition_penalty != 1:
            found.append(hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if sampling.no_repeat_ngram:
            found.append(hf.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram))
        if sampling.bad_words:
            words = [list(word) for word in sampling.bad_words]
            found.append(hf.NoBadWordsLogitsProcessor(words, eos_token_id=None))
        if needs_stop:
            stops = sorted(stop_ids)
            found.append(hf.MinNewTokensLengthLogitsProcessor(prompt, sampling.min_tokens, stops, device="cpu"))
    return found + list(sampling.processors)


def _penalty(sampling: SamplingParams, prompt: int) -> Processor:
    """Presence and frequency penalties, as OpenAI's API has them: of the tokens written, not of the prompt."""

    def apply(ids_1T: torch.Tensor, scores_1V: torch.Tensor) -> torch.Tensor:
        seen, times = ids_1T[0, prompt:].unique(return_counts=True)
        off = sampling.presence_penalty + sampling.frequency_penalty * times.to(scores_1V.dtype)
        return scores_1V.index_add(1, seen.to(scores_1V.device), -off.to(scores_1V.device)[None])

    return apply


def candidates(logits_V: torch.Tensor, sampling: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [C] and ids [C] of the tokens still in the draw, after the temperature and the filters."""
    given_V = logits_V.float()
    logits_V = given_V / sampling.temperature
    # A temperature so low that the quotient is no float32.
    if sampling.temperature < 1e-3 and not logits_V.isfinite().all():
        logits_V = (given_V - given_V.max()).double() / sampling.temperature
    V = logits_V.shape[-1]
    top_p = sampling.top_p if sampling.top_p is not None and sampling.top_p < 1 else None
    if sampling.top_k is not None and sampling.top_k < V:
        # Those as likely as the k-th stay too, as in transformers.
        least = logits_V.topk(sampling.top_k, sorted=False).values.min()
        ids = (logits_V >= least).nonzero()[:, 0]
        logits = logits_V[ids]
    else:
        ids, logits = torch.arange(V, device=logits_V.device), logits_V
    if top_p is not None:
        logits, ids = _nucleus(logits, ids, top_p)
    if sampling.min_p:
        keep = logits.softmax(dim=-1)
        keep = keep >= sampling.min_p * keep.max()
        logits, ids = logits[keep], ids[keep]
    if sampling.typical_p is not None and sampling.typical_p < 1:
        logits, ids = _typical(logits, ids, sampling.typical_p)
    return logits, ids


def _nucleus(logits: torch.Tensor, ids: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = logits.logsumexp(dim=-1)
    for enough in (_ENOUGH, logits.shape[-1]):
        best = logits.topk(min(enough, logits.shape[-1]))
        p = (best.values - total).exp()
        before = p.cumsum(dim=-1) - p
        # A token goes when those before it already make up top_p; the likeliest always stays.
        if before[-1] >= top_p or enough >= logits.shape[-1]:
            break
    keep = before < top_p
    return best.values[keep], ids[best.indices[keep]]


def _typical(logits: torch.Tensor, ids: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    surprise = -(p * log_p).nansum()
    order = (-log_p - surprise).abs().sort().indices
    last = int((p[order].cumsum(dim=-1) < mass).sum())
    kept = order[: last + 1]
    return logits[kept], ids[kept]


class Sampler:
    """Draws the tokens of one sequence; it holds the sequence's draws and, where a strategy needs them, its tokens.

    Args:
        sampling: the strategy.
        prompt: the prompt's tokens.
        stop_ids: tokens that end the sequence.
    """

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], stop_ids: Collection[int]) -> None:
        self.sampling = sampling
        self.ids = list(prompt)
        self.processors = processors(sampling, len(prompt), stop_ids)
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def sample(self, logits_V: torch.Tensor) -> int:
        """Return the next token for `logits_V`."""
        if self.processors:
            ids_1T, scores_1V = torch.tensor([self.ids]), logits_V.float()[None].cpu()
            for processor in self.processors:
                scores_1V = processor(ids_1T, scores_1V)
            logits_V = scores_1V[0]
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        logits_C, ids_C = candidates(logits_V, self.sampling)
        if self.processors and logits_C.max() == -torch.inf:
            raise SmolseekError("no token is left to choose from: leave out a bad word or a penalty")
        drawn = torch.multinomial(logits_C.softmax(dim=-1).cpu(), 1, generator=self.generator)
        return int(ids_C[drawn.to(ids_C.device)])

    def append(self, token: int) -> None:
        """Note that `token` comes next."""
        self.ids.append(token)
