"""Beam search with the semantics of transformers' `generate`.

Shapes: W beams, V vocab_size.
"""

import time
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Decoder, Result, StopReason, check_request, require_finite
from smolseek.generate.sampling import Processor, SamplingParams, processors
from smolseek.model.transformer import CausalLM

EarlyStopping = bool | Literal["never"]


class _Hypothesis(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    score: float
    """Sum of the log-probabilities; of a finished one, over its length to the power of the length penalty."""
    parent: int = 0
    """Beam that it continues."""
    reason: StopReason | None = None


def beam_search(
    model: CausalLM,
    ids: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    sampling: SamplingParams | None = None,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    returned: int = 1,
) -> list[Result]:
    """Return the `returned` best continuations that a search over `beams` open ones finds, best first.

    A finished one is scored by its summed log-probabilities over its length (the stop token counts) to the power of
    `length_penalty`. The search ends when `early_stopping` is true and `beams` are finished, or when no open one can
    beat the finished ones: judged at its present length, or with "never" at the greatest possible one.

    Args:
        model: the model.
        ids: the prompt.
        beams: continuations kept open.
        max_tokens: new tokens, at most.
        sampling: penalties, bans and processors to apply to the log-probabilities; the search itself draws nothing.
        stop_ids: tokens that finish a continuation; they are not part of it.
        length_penalty: above 0 favours long ones, below 0 short ones.
        early_stopping: when to end, see above.
        returned: continuations to return.

    Raises:
        SmolseekError: for an empty prompt or one beyond the context, or numbers out of range.
    """
    check_request(model, [ids], max_tokens)
    if beams < 1 or not 1 <= returned <= beams:
        raise SmolseekError(f"beams {beams} and n {returned} do not fit: n is at most the beams, and both at least 1")
    if not -1000 <= length_penalty <= 1000:
        raise SmolseekError(f"length-penalty {length_penalty} is out of range: 1 is usual")
    begun = time.perf_counter()
    stops = sorted(set(stop_ids))
    most = min(max_tokens, model.config.max_position_embeddings - len(ids))
    limit: StopReason = "length" if most == max_tokens else "context"
    changes = processors(sampling or SamplingParams(), len(ids), stops)
    decoder = Decoder(model, beams, len(ids) + most)
    logits_WV = decoder.prefill(0, ids).expand(beams, -1)
    for row in range(1, beams):
        decoder.copy(0, row)
    read = time.perf_counter()
    # All beams begin alike: only the first counts, or they would all find the same.
    open_ = [_Hypothesis([], [], -1e9 if beam else 0.0) for beam in range(beams)]
    finished: list[_Hypothesis] = []
    for length in range(1, most + 1):
        full = early_stopping is True and len(finished) == beams
        longer: list[_Hypothesis] = []
        for rank, new in enumerate(_best(logits_WV, open_, ids, changes, max(2, 1 + len(stops)) * beams)):
            ends = new.tokens[-1] in stops
            if ends or length == most:
                # Candidates beyond the first `beams` only stand by to go on.
                if rank < beams and not full:
                    tokens, logprobs = (new if not ends else open_[new.parent])[:2]
                    reason: StopReason = "stop_token" if ends else limit
                    finished.append(_Hypothesis(tokens, logprobs, new.score / length**length_penalty, reason=reason))
            elif len(longer) < beams:
                longer.append(new)
        finished = sorted(finished, key=lambda f: -f.score)[:beams]
        reach = most if early_stopping == "never" and length_penalty > 0 else length
        if length == most or not longer or (len(finished) == beams and early_stopping is True):
            break
        if len(finished) == beams and longer[0].score / reach**length_penalty <= finished[-1].score:
            break
        open_ = longer + [longer[0]._replace(score=-1e9)] * (beams - len(longer))
        decoder.reorder_cache([beam.parent for beam in open_])
        logits_WV = decoder.step([beam.tokens[-1] for beam in open_])
    times = read - begun, time.perf_counter() - read
    about = len(ids), *times, decoder.cache.nbytes
    return [Result(f.tokens, f.logprobs, f.reason, *about, f.score) for f in finished[:returned]]


def _best(
    logits_WV: torch.Tensor, beams: list[_Hypothesis], prompt: Sequence[int], changes: list[Processor], count: int
) -> list[_Hypothesis]:
    """Return the `count` best continuations of `beams` by one token, best first."""
    require_finite(logits_WV)
    own_WV = logits_WV.cpu().log_softmax(dim=-1)
    changed_WV = own_WV
    so_far = torch.tensor([[*prompt, *beam.tokens] for beam in beams]) if changes else torch.empty(0)
    for change in changes:
        changed_WV = torch.cat([change(so_far[w : w + 1], changed_WV[w : w + 1].clone()) for w in range(len(beams))])
    scores_W = torch.tensor([beam.score for beam in beams])
    best = (changed_WV + scores_W[:, None]).flatten().topk(min(count, own_WV.numel()))
    logprobs = own_WV.flatten()[best.indices].tolist()
    found = []
    for score, at, logprob in zip(best.values.tolist(), best.indices.tolist(), logprobs, strict=True):
        parent, token = divmod(at, own_WV.shape[1])
        tokens, so_far_logprobs, *_ = beams[parent]
        found.append(_Hypothesis([*tokens, token], [*so_far_logprobs, logprob], score, parent))
    return found
