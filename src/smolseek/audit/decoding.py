"""Decoding: are the logits the same with a cache, in a batch, and after saving and loading?

The limit is a hundred times the rounding noise (`probe.rounding_noise`), because decoding sums in another order. After
saving and loading, logits must be equal bit for bit.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from smolseek.audit import probe
from smolseek.audit.check import Check
from smolseek.audit.probe import Subject
from smolseek.errors import SmolseekError, reason
from smolseek.model.cache import Cache
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_weights, save_folder

CACHED = Check(
    name="decoding: cached",
    limit=100.0,
    unit="x rounding noise",
    meaning="decoding with a cache gives other logits than a forward pass over the whole sequence",
    look="RoPE positions, the mask if several tokens follow a cache, or a leak (a cache has no later tokens)",
    hint="compare layer by layer: the error is in the first layer whose output differs",
)
BATCH = replace(
    CACHED,
    name="decoding: batch equals single",
    meaning="the logits of a sequence depend on the other sequences of its batch",
    look="norms over the batch, experts of limited capacity, a capacity computed from the batch size",
    hint="route each token by its own scores, and drop no token",
)
RELOADED = Check(
    name="decoding: saved and reloaded",
    unit="logit difference",
    meaning="a saved model is not the same model after loading",
    look="state outside parameters and persistent buffers, number formats, tied weights",
    hint="register learnt state as a parameter or a persistent buffer",
)


def check_decoding(subject: Subject) -> list[Check]:
    """Check decoding with a cache, in a batch, and after saving and loading."""
    model = probe.uncompiled(subject.model)
    ids = probe.random_ids(1, min(32, subject.context), subject.vocab, 11)
    precise = probe.precise_copy(model, ids)
    if precise is None:
        checks = [Check(name="decoding").skip("the model cannot be copied in float64 or float32")]
    else:
        noise = probe.rounding_noise(precise, ids, torch.finfo(torch.float32).eps)
        batch = probe.random_ids(3, ids.shape[1], subject.vocab, 12)
        with torch.no_grad():
            batched = probe.call(precise, batch).double()
            single = torch.cat([probe.call(precise, ids[None]) for ids in batch]).double()
        change = probe.largest_change(batched, single)
        done = "largest difference of the logits of 3 sequences in one batch and each alone"
        checks = [_check_cached(precise, ids, noise), BATCH.judge(change / noise, done)]
        del precise
    return [*checks, _check_reloaded(model, ids, subject.build)]


@torch.no_grad()
def _check_cached(model: nn.Module, ids: torch.Tensor, noise: float) -> Check:
    T = ids.shape[1]
    ids = ids.to(probe.device_of(model))
    if isinstance(model, CausalLM):
        cache = Cache(model.config, 1, T, dtype=model.lm_head.weight.dtype, device=ids.device)
        # First many tokens, then three, then one at a time: each case has its own code path in attention.
        chunks = [ids[:, : T // 2], ids[:, T // 2 : T // 2 + 3], *ids[:, T // 2 + 3 :].split(1, dim=1)]
        cached = torch.cat([model(chunk, cache) for chunk in chunks], dim=1).double()
        uncached = probe.call(model, ids).double()
        how = f"{T} random tokens read at once and in chunks with a cache"
    elif probe.is_transformers(model):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig(  # type: ignore[assignment]
            max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        try:
            out = model.generate(ids, generation_config=model.generation_config)  # type: ignore[operator]
        except Exception as error:
            return CACHED.skip(f"generate() failed ({reason(error)})")
        cached = torch.stack(out.logits, dim=1).double()
        uncached = probe.call(model, out.sequences[:, :-1]).double()[:, T - 1 :]
        how = f"8 tokens generated with transformers' cache after {T} random tokens, and read at once"
    else:
        return CACHED.skip("only models of smolseek and transformers have a known cache")
    return CACHED.judge(probe.largest_change(cached, uncached) / noise, f"largest difference of the logits of {how}")


@torch.no_grad()
def _check_reloaded(model: nn.Module, ids: torch.Tensor, build: Callable[[], nn.Module] | None) -> Check:
    before = probe.call(model.eval(), ids).double()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, CausalLM):
            save_folder(model, Path(folder))
            reloaded: nn.Module = copy.deepcopy(model)
            for tensor in [*reloaded.parameters(), *reloaded.buffers()]:
                if tensor.dtype.is_floating_point:
                    tensor.fill_(float("nan"))
            reloaded.reset_buffers()  # type: ignore[operator]
            load_weights(reloaded, folder)  # type: ignore[arg-type]
            how = "saving as a folder and loading into a model without weights"
        elif probe.is_transformers(model):
            model.save_pretrained(folder)  # type: ignore[operator]
            dtype = next(model.parameters()).dtype
            reloaded = type(model).from_pretrained(folder, dtype=dtype)  # type: ignore[attr-defined]
            how = "save_pretrained and from_pretrained"
        elif build is not None:
            reloaded = probe.uncompiled(build())
            for parameter in reloaded.parameters():
                parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(13))
            try:
                reloaded.load_state_dict(model.state_dict())
            except RuntimeError as error:
                raise SmolseekError(
                    f"the model's state_dict does not load into a second copy of the model: {error}"
                ) from None
            how = "loading its state_dict into a second model"
        else:
            return RELOADED.skip("a second model of this architecture cannot be built")
    after = probe.call(reloaded.to(probe.device_of(model)).eval(), ids).double()
    return RELOADED.judge(probe.largest_change(after, before), f"largest difference of the logits after {how}")
