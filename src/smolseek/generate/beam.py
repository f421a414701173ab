"""Beam search with the semantics of transformers' `generate`.

Shapes: W beams, V vocab_size.
"""

import math
import time
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Decoder, Result, StopReason, check_request, require_finite
from smolseek.generate.sampling import NO_TOKEN_LEFT, Processor, SamplingParams, processors
from smolseek.model.transformer import CausalLM

EarlyStopping = bool | Literal["never"]


class _Hypothesis(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    score: float
    """Sum of the log-probabilities; a finished hypothesis divides the sum by length ** length_penalty."""
    parent: int = 0
    """Number of the beam that this hypothesis continues."""
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
    """Return the `returned` best continuations found by a search with `beams` running hypotheses, best first.

    The score of a finished hypothesis is its summed log-probability divided by length ** length_penalty; the length
    includes the stop token. With `early_stopping` true the search ends when `beams` hypotheses are finished. Otherwise
    the search ends when no running hypothesis can reach a better score. The best score that a running hypothesis can
    reach is estimated from its current length, or from the maximum length if `early_stopping` is "never".

    Args:
        model: the model.
        ids: the prompt.
        beams: number of running hypotheses.
        max_tokens: new tokens, at most.
        sampling: penalties, banned words and processors, which change the log-probabilities. No token is sampled.
        stop_ids: tokens that finish a hypothesis; they are not part of the result.
        length_penalty: values above 0 favour long texts, values below 0 favour short texts.
        early_stopping: when the search ends, as described above.
        returned: number of continuations to return.

    Raises:
        SmolseekError: for an empty prompt, a prompt longer than the context, or numbers out of range.
    """
    check_request(model, [ids], max_tokens)
    if beams < 1 or not 1 <= returned <= beams:
        raise SmolseekError(f"n {returned} is not between 1 and the number of beams, {beams}: lower n, or raise beams")
    start = time.perf_counter()
    stops = sorted(set(stop_ids))
    most = min(max_tokens, model.config.max_position_embeddings - len(ids))
    limit: StopReason = "length" if most == max_tokens else "context"
    chain = processors(sampling or SamplingParams(), len(ids), stops)
    decoder = Decoder(model, beams, len(ids) + most)
    logits_WV = decoder.prefill(0, ids).expand(beams, -1)
    decoder.reorder_cache([0] * beams)
    decoding = time.perf_counter()
    # All beams start from the same prompt. A low score keeps all but the first from finding the same continuations.
    running = [_Hypothesis([], [], -1e9 if beam else 0.0) for beam in range(beams)]
    finished: list[_Hypothesis] = []
    for length in range(1, most + 1):
        full = early_stopping is True and len(finished) == beams
        longer: list[_Hypothesis] = []
        for rank, new in enumerate(_best(logits_WV, running, ids, chain, max(2, 1 + len(stops)) * beams)):
            stopped = new.tokens[-1] in stops
            if stopped or length == most:
                # Only the best `beams` candidates may finish; the other candidates may only continue.
                if rank < beams and not full:
                    tokens, logprobs = (running[new.parent] if stopped else new)[:2]
                    reason: StopReason = "stop_token" if stopped else limit
                    finished.append(_Hypothesis(tokens, logprobs, new.score / length**length_penalty, reason=reason))
            elif len(longer) < beams:
                longer.append(new)
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:beams]
        reach = most if early_stopping == "never" and length_penalty > 0 else length
        if length == most or not longer or (len(finished) == beams and early_stopping is True):
            break
        if len(finished) == beams and longer[0].score / reach**length_penalty <= finished[-1].score:
            break
        running = longer + [longer[0]._replace(score=-1e9)] * (beams - len(longer))
        decoder.reorder_cache([beam.parent for beam in running])
        logits_WV = decoder.step([beam.tokens[-1] for beam in running])
    measured = len(ids), decoding - start, time.perf_counter() - decoding, decoder.cache.nbytes
    return [Result(best.tokens, best.logprobs, best.reason, *measured, best.score) for best in finished[:returned]]


def _best(
    logits_WV: torch.Tensor, beams: list[_Hypothesis], prompt: Sequence[int], chain: list[Processor], count: int
) -> list[_Hypothesis]:
    """Return the `count` best continuations of `beams` by one token, best first."""
    require_finite(logits_WV)
    logp_WV = logits_WV.cpu().log_softmax(dim=-1)
    processed_WV = logp_WV.clone()
    for processor in chain:
        for w, beam in enumerate(beams):
            processed_WV[w] = processor(torch.tensor([[*prompt, *beam.tokens]]), processed_WV[w : w + 1].clone())[0]
    scores_W = torch.tensor([beam.score for beam in beams])
    best = (processed_WV + scores_W[:, None]).flatten().topk(min(count, logp_WV.numel()))
    hypotheses = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if score == -math.inf:  # a banned token
            break
        parent, token = divmod(index, logp_WV.shape[1])
        tokens, logprobs, *_ = beams[parent]
        hypotheses.append(_Hypothesis([*tokens, token], [*logprobs, float(logp_WV[parent, token])], score, parent))
    if not hypotheses:
        raise SmolseekError(NO_TOKEN_LEFT)
    return hypotheses
