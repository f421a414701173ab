"""The engine: a generator of tokens over a preallocated cache."""

from collections.abc import Collection, Iterator, Sequence

import torch

from smolseek.errors import SmolseekError
from smolseek.generate.sampling import Sampling, pick
from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM


def generate(
    model: CausalLM,
    ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_tokens` new tokens after the prompt `ids`; ends before a token of `stop_ids`.

    It also ends where the model's context is full. The prompt is read in one pass, then each token costs one pass
    over the cache.

    Raises:
        SmolseekError: for an empty prompt, one beyond the context, or `max_tokens` below 1.
    """
    context = model.config.max_position_embeddings
    if not ids:
        raise SmolseekError("the prompt is empty: give at least one word")
    if len(ids) >= context:
        raise SmolseekError(f"the prompt has {len(ids)} tokens, the model's context {context}: shorten the prompt")
    if max_tokens < 1:
        raise SmolseekError(f"max-tokens {max_tokens} is below 1: ask for at least one")
    return _tokens(model, ids, sampling, min(max_tokens, context - len(ids)), frozenset(stop_ids))


def _tokens(
    model: CausalLM, ids: Sequence[int], sampling: Sampling, max_tokens: int, stop_ids: frozenset[int]
) -> Iterator[int]:
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    capacity = len(ids) + max_tokens
    cache = Cache(model.config, 1, capacity, dtype=model.lm_head.weight.dtype, device=device)
    new = torch.tensor([list(ids)], device=device)
    for _ in range(max_tokens):
        # inference_mode is entered anew for each token: a generator must not leave it on for its caller.
        with torch.inference_mode():
            last_D = model.hidden(new, cache).hidden_BTD[0, -1]
            token = pick(model.lm_head(last_D), sampling, generator)
        if token in stop_ids:
            return
        yield token
        new = torch.tensor([[token]], device=device)
