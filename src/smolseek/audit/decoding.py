"""Decoding: is a model the same with a cache as without, in a batch as alone, and after saving as before?

Mistakes it finds: wrong positions or masks beside a cache, sequences that feel their batch, state that is not saved.
Limits: a hundred times the rounding noise (`probe.rounding_noise`), since decoding sums in another order than reading
at once does, and a defect is far above that; what is saved is equal bit for bit.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from smolseek.audit.finding import Check, Finding, skipped
from smolseek.audit.probe import (
    call,
    device_of,
    is_transformers,
    largest_change,
    precise_copy,
    random_ids,
    rounding_noise,
    uncompiled,
)
from smolseek.audit.subject import Subject
from smolseek.errors import SmolseekError, reason
from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_weights, save_folder

CACHED = Check(
    name="decoding: cached",
    limit=100.0,
    meaning="decoding computes another model than the one that was trained",
    look="positions given to RoPE, the mask when several tokens follow a cache, or a leak: the cache cannot see later "
    "tokens, the whole sequence can",
    hint="compare layer by layer: the first layer whose cached output differs holds the mistake",
)
BATCH = Check(
    name="decoding: batch equals single",
    limit=100.0,
    meaning="what a sequence gives depends on its company",
    look="norms over the batch, experts with limited room, capacities computed from the batch's size",
    hint="route every token by its own scores alone, without dropping",
)
RELOADED = Check(
    name="decoding: saved and reloaded",
    limit=0.0,
    meaning="what is saved is not the whole model",
    look="state outside parameters and persistent buffers, number formats on the way, tied weights",
    hint="register what is learnt as a parameter or a persistent buffer",
)


def check_decoding(subject: Subject) -> list[Finding]:
    """Return the findings on decoding."""
    model = uncompiled(subject.model)
    ids = random_ids(1, min(32, subject.context), subject.vocab, 11)
    twin = precise_copy(model, ids)
    if twin is None:
        findings = [skipped("decoding", "the model cannot be copied in float64 or float32")]
    else:
        noise = rounding_noise(twin, ids, torch.finfo(torch.float32).eps)
        batch = random_ids(3, ids.shape[1], subject.vocab, 12)
        findings = [_check_cached(twin, ids, noise), _check_batch(twin, batch, noise)]
        del twin
    return [*findings, _check_reloaded(model, ids, subject.remake)]


@torch.no_grad()
def _check_cached(model: nn.Module, ids: torch.Tensor, noise: float) -> Finding:
    T = ids.shape[1]
    given = ids.to(device_of(model))
    if isinstance(model, CausalLM):
        cache = Cache(model.config, 1, T, dtype=model.lm_head.weight.dtype, device=given.device)
        # All at once, then several, then one by one: each way has its own path through attention.
        half = T // 2
        pieces = [given[:, :half], given[:, half : half + 3], *given[:, half + 3 :].split(1, dim=1)]
        cached = torch.cat([model(piece, cache) for piece in pieces], dim=1).double()
        whole = call(model, ids).double()
        how = f"{T} random tokens read at once, and in pieces with a cache"
    elif is_transformers(model):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig(  # type: ignore[assignment]
            max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        try:
            out = model.generate(given, generation_config=model.generation_config)  # type: ignore[operator]
        except Exception as error:
            return CACHED.skip(f"generate() failed ({reason(error)})")
        cached = torch.stack(out.logits, dim=1).double()
        whole = call(model, out.sequences[:, :-1]).double()[:, T - 1 :]
        how = f"8 tokens written with transformers' cache after {T} random ones, and read at once"
    else:
        return CACHED.skip("no cache is known: our own and transformers' models have one")
    done = f"{how}; largest difference of the logits, in units of rounding noise"
    return CACHED.judge(done, largest_change(cached, whole) / noise)


@torch.no_grad()
def _check_batch(model: nn.Module, batch: torch.Tensor, noise: float) -> Finding:
    together = call(model, batch).double()
    apart = torch.cat([call(model, ids[None]) for ids in batch]).double()
    return BATCH.judge(
        "3 sequences in one batch and each alone; largest difference of the logits, in units of rounding noise",
        largest_change(together, apart) / noise,
    )


@torch.no_grad()
def _check_reloaded(model: nn.Module, ids: torch.Tensor, remake: Callable[[], nn.Module] | None) -> Finding:
    before = call(model.eval(), ids).double()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, CausalLM):
            save_folder(model, Path(folder))
            again: nn.Module = copy.deepcopy(model)
            for tensor in [*again.parameters(), *again.buffers()]:
                if tensor.dtype.is_floating_point:
                    tensor.fill_(float("nan"))
            again.reset_buffers()  # type: ignore[operator]
            load_weights(again, folder)  # type: ignore[arg-type]
            how = "saved as a folder and loaded into a model without weights"
        elif is_transformers(model):
            model.save_pretrained(folder)  # type: ignore[operator]
            dtype = next(model.parameters()).dtype
            again = type(model).from_pretrained(folder, dtype=dtype)  # type: ignore[attr-defined]
            how = "saved with save_pretrained and loaded with from_pretrained"
        elif remake is not None:
            again = uncompiled(remake())
            for parameter in again.parameters():
                parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(13))
            try:
                again.load_state_dict(model.state_dict())
            except RuntimeError as error:
                raise SmolseekError(f"the model's state_dict does not load into another of its kind: {error}") from None
            how = "state_dict loaded into another model of its kind"
        else:
            return RELOADED.skip("there is no way to make another model of its kind")
    after = call(again.to(device_of(model)).eval(), ids).double()
    return RELOADED.judge(f"{how}; largest difference of the logits", largest_change(after, before))
