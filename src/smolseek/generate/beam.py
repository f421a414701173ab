"""Beam search with the semantics of transformers' `generate`.

Shapes: W beams, V vocab_size, X candidates kept at each step.
"""

import time
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Decoder, Result, StopReason, check_request, require_finite
from smolseek.generate.sampling import SamplingParams, processors
from smolseek.model.transformer import CausalLM


class _Finished(NamedTuple):
    score: float
    tokens: list[int]
    logprobs: list[float]
    reason: StopReason


def beam_search(
    model: CausalLM,
    ids: Sequence[int],
    *,
    beams: int,
    max_tokens: int,
    sampling: SamplingParams | None = None,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    returned: int = 1,
    native: bool = True,
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
        native: False keeps to the model's forward pass.

    Raises:
        SmolseekError: for an empty prompt or one beyond the context, or numbers out of range.
    """
    check_request(model, [ids], max_tokens)
    if beams < 1 or not 1 <= returned <= beams:
        raise SmolseekError(f"beams {beams} and n {returned} do not fit: n is at most the beams, and both at least 1")
    if not -1000 <= length_penalty <= 1000:
        raise SmolseekError(f"length-penalty {length_penalty} is out of range: 1 is usual")
    sampling = sampling or SamplingParams()
    begun = time.perf_counter()
    stops = sorted(set(stop_ids))
    context = model.config.max_position_embeddings
    most = min(max_tokens, context - len(ids))
    limit: StopReason = "length" if most == max_tokens else "context"
    keep = max(2, 1 + len(stops)) * beams
    changes = processors(sampling, len(ids), stops)
    decoder = Decoder(model, beams, len(ids) + most, native=native)
    logits_WV = decoder.prefill(0, ids)
    for row in range(1, beams):
        decoder.copy(0, row)
    read = time.perf_counter()
    # All beams begin alike: only the first counts, or they would all find the same.
    logits_WV = logits_WV.expand(beams, -1)
    scores_W = torch.full((beams,), -1e9)
    scores_W[0] = 0.0
    texts: list[list[int]] = [[] for _ in range(beams)]
    paths: list[list[float]] = [[] for _ in range(beams)]
    finished: list[_Finished] = []
    for length in range(1, most + 1):
        require_finite(logits_WV)
        own_WV = logits_WV.cpu().log_softmax(dim=-1)
        changed_WV = own_WV
        if changes:
            so_far = torch.tensor([[*ids, *text] for text in texts])
            for change in changes:
                changed_WV = torch.cat([change(so_far[w : w + 1], changed_WV[w : w + 1].clone()) for w in range(beams)])
        V = own_WV.shape[1]
        best = (changed_WV + scores_W[:, None]).flatten().topk(min(keep, beams * V))
        open_beams: list[tuple[int, int, float]] = []
        full = early_stopping is True and len(finished) == beams
        new = []
        for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = divmod(at, V)
            ends = token in stops
            if ends or length == most:
                # Candidates beyond the first `beams` only stand by to go on.
                if rank < beams and not full:
                    text = texts[beam] if ends else [*texts[beam], token]
                    path = [*paths[beam], float(own_WV[beam, token])][: len(text)]
                    new.append(_Finished(score / length**length_penalty, text, path, "stop_token" if ends else limit))
            elif len(open_beams) < beams:
                open_beams.append((beam, token, score))
        finished = sorted([*finished, *new], key=lambda f: -f.score)[:beams]
        if length == most or not open_beams:
            break
        if early_stopping is True and len(finished) == beams:
            break
        reach = most if early_stopping == "never" and length_penalty > 0 else length
        if len(finished) == beams and open_beams[0][2] / reach**length_penalty <= finished[-1].score:
            break
        while len(open_beams) < beams:
            open_beams.append((open_beams[0][0], open_beams[0][1], -1e9))
        texts = [[*texts[beam], token] for beam, token, _ in open_beams]
        paths = [[*paths[beam], float(own_WV[beam, token])] for beam, token, _ in open_beams]
        scores_W = torch.tensor([score for _, _, score in open_beams])
        decoder.reorder_cache([beam for beam, _, _ in open_beams])
        logits_WV = decoder.step([token for _, token, _ in open_beams])
    seconds = time.perf_counter() - read
    return [
        Result(
            tokens=found.tokens,
            logprobs=found.logprobs,
            stop_reason=found.reason,
            prompt_tokens=len(ids),
            prompt_seconds=read - begun,
            decode_seconds=seconds,
            cache_bytes=decoder.cache.nbytes,
            score=found.score,
        )
        for found in finished[:returned]
    ]
