"""Is a model the same with a cache as without, in a batch as alone, and after saving as before?"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from smolseek.audit.causality import random_ids
from smolseek.audit.finding import Finding, judged, skipped
from smolseek.audit.probe import call, device_of, is_transformers, precise_copy, rounding_noise
from smolseek.errors import SmolseekError
from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_weights, save_folder

MARGIN = 100.0
"""Decoding sums in another order than reading at once does: a defect is far above this many times the noise."""


def check_decoding(
    model: nn.Module, vocab: int, context: int, *, remake: Callable[[], nn.Module] | None = None, save: bool = True
) -> list[Finding]:
    """Return the findings on decoding; `remake` builds another model of the kind, to load the saved weights into."""
    original = getattr(model, "_orig_mod", model)
    T = min(32, context)
    ids = random_ids(1, T, vocab, 11)
    findings = []
    twin = precise_copy(model, ids)
    if twin is None:
        findings.append(skipped("decoding", "the model cannot be copied in float64 or float32"))
    else:
        noise = rounding_noise(twin, ids, torch.finfo(torch.float32).eps)
        findings += [_cached(twin, ids, noise), _alone(twin, vocab, T, noise)]
        del twin
    findings.append(_reloaded(original, ids, remake) if save else skipped("decoding: saved and reloaded", "left out"))
    return findings


@torch.no_grad()
def _cached(model: nn.Module, ids: torch.Tensor, noise: float) -> Finding:
    name = "decoding: cached"
    T = ids.shape[1]
    if isinstance(model, CausalLM):
        cache = Cache(model.config, 1, T, dtype=model.lm_head.weight.dtype, device=device_of(model))
        given, half = ids.to(device_of(model)), T // 2
        # All at once, then several, then one by one: each way has its own path through attention.
        pieces = [given[:, :half], given[:, half : half + 3], *given[:, half + 3 :].split(1, dim=1)]
        cached = torch.cat([model(piece, cache) for piece in pieces], dim=1).double()
        whole = call(model, ids).double()
        how = f"{T} random tokens read at once, and in pieces with a cache"
    elif is_transformers(model):
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        model.generation_config = config  # type: ignore[assignment]
        try:
            out = model.generate(ids.to(device_of(model)), generation_config=config)  # type: ignore[operator]
        except Exception as error:
            return skipped(name, f"generate() failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
        cached = torch.stack(out.logits, dim=1).double()
        whole = call(model, out.sequences[:, :-1]).double()[:, ids.shape[1] - 1 :]
        how = f"8 tokens written with transformers' cache after {T} random ones, and read at once"
    else:
        return skipped(name, "no cache is known: our own and transformers' models have one")
    return judged(
        name,
        f"{how}; largest difference of the logits, in units of rounding noise",
        float((cached - whole).abs().max()) / noise,
        MARGIN,
        meaning="decoding computes another model than the one that was trained",
        look="positions given to RoPE, the mask when several tokens follow a cache, or a leak: the cache cannot see "
        "later tokens, the whole sequence can",
        hint="compare layer by layer: the first layer whose cached output differs holds the mistake",
    )


@torch.no_grad()
def _alone(model: nn.Module, vocab: int, T: int, noise: float) -> Finding:
    batch = random_ids(3, T, vocab, 12)
    together = call(model, batch).double()
    apart = torch.cat([call(model, row[None]) for row in batch]).double()
    return judged(
        "decoding: batch equals single",
        "3 sequences in one batch and each alone; largest difference of the logits, in units of rounding noise",
        float((together - apart).abs().max()) / noise,
        MARGIN,
        meaning="what a sequence gives depends on its company",
        look="norms over the batch, experts with limited room, capacities computed from the batch's size",
        hint="route every token by its own scores alone, without dropping",
    )


@torch.no_grad()
def _reloaded(model: nn.Module, ids: torch.Tensor, remake: Callable[[], nn.Module] | None) -> Finding:
    name = "decoding: saved and reloaded"
    before = call(model.eval(), ids).double()
    if isinstance(model, CausalLM):
        with tempfile.TemporaryDirectory() as folder:
            save_folder(model, Path(folder))
            again: nn.Module = copy.deepcopy(model)
            for tensor in [*again.parameters(), *again.buffers()]:
                if tensor.dtype.is_floating_point:
                    tensor.fill_(float("nan"))
            again.reset_buffers()  # type: ignore[operator]
            load_weights(again, folder)  # type: ignore[arg-type]
        how = "saved as a folder and loaded into a model without weights"
    elif is_transformers(model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            again = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
        how = "saved with save_pretrained and loaded with from_pretrained"
    elif remake is not None:
        again = remake()
        again = getattr(again, "_orig_mod", again)
        for parameter in again.parameters():
            parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(13))
        try:
            again.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise SmolseekError(f"the model's state_dict does not load into another of its kind: {error}") from None
        how = "state_dict loaded into another model of its kind"
    else:
        return skipped(name, "there is no way to make another model of its kind")
    after = call(again.to(device_of(model)).eval(), ids).double()
    return judged(
        name,
        f"{how}; largest difference of the logits",
        float((after - before).abs().max()),
        0.0,
        meaning="what is saved is not the whole model",
        look="state outside parameters and persistent buffers, number formats on the way, tied weights",
        hint="register what is learnt as a parameter or a persistent buffer",
    )
