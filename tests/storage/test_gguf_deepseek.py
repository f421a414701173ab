"""GGUF files of DeepSeek models that other programs wrote: what differs from smolseek's own files."""

import gguf
import pytest
import torch
from small_models import MLA, small_tokenizer

from smolseek.errors import SmolseekError
from smolseek.export import gguf as export_gguf
from smolseek.export.gguf_metadata import entry
from smolseek.export.gguf_tensors import Tensor
from smolseek.export.source import open_source
from smolseek.model.transformer import new_model
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_folder import load_model, save_folder

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_folder(new_model(MLA, seed=3), path, small_tokenizer())
    return path


def write(folder, path, *, left_out=(), added=(), **changes):
    """Write the float32 file of a model with other metadata (None removes a key) and other tensors."""
    plan = export_gguf.plan(open_source(str(folder)), "f32", "m")
    entries = {e.key: e for e in plan.entries}
    for key, value in changes.items():
        name = f"deepseek2.{key.replace('__', '.')}"
        entries.pop(name, None)
        if value is not None:
            entries[name] = entry(name, value)
    tensors = [pair for pair in plan.tensors if not pair[0].name.endswith(tuple(left_out))]
    tensors += [(Tensor(name, tuple(t.shape), lambda t=t: t), gguf.GGMLQuantizationType.F32) for name, t in added]
    export_gguf.write(path, plan._replace(entries=[*entries.values()], tensors=tensors))
    return path


def logits(target):
    with torch.inference_mode():
        return load_model(target).model(IDS)


def test_kv_b_in_one_tensor_and_head_sizes_without_mla(folder, tmp_path):
    """Files from before llama.cpp split kv_b by heads."""
    model = load_model(folder).model
    joined = [(f"blk.{n}.attn_kv_b.weight", model.model.layers[n].self_attn.kv_b_proj.weight.data) for n in range(2)]
    old = {"attention__key_length_mla": None, "attention__value_length_mla": None}
    old |= {"attention__key_length": MLA.qk_head_dim, "attention__value_length": MLA.v_head_dim}
    path = write(folder, tmp_path / "m.gguf", left_out=("attn_k_b.weight", "attn_v_b.weight"), added=joined, **old)
    torch.testing.assert_close(logits(path), logits(folder), rtol=0, atol=1e-5)


def test_layers_for_multi_token_prediction_are_left_out(folder, tmp_path):
    added = [("blk.2.nextn.eh_proj.weight", torch.zeros(64, 128)), ("blk.2.attn_norm.weight", torch.ones(64))]
    path = write(folder, tmp_path / "m.gguf", added=added, block_count=3, nextn_predict_layers=1)
    torch.testing.assert_close(logits(path), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_gating_func": None}, "a softmax router"),
        ({"expert_gating_func": 1}, "a softmax router"),
        ({"rope__scaling__type": "linear"}, "deepseek2.rope.scaling.type 'linear'"),
        ({"rope__scaling__type": "yarn"}, "'yarn' without yarn_log_multiplier"),
        ({"attention__kv_lora_rank": None}, "kv_lora_rank"),
        ({"left_out": ("attn_v_b.weight",)}, "attn_v_b"),
        ({"added": [("blk.0.attn_q_a.bias", torch.zeros(64))]}, r"blk\.0\.attn_q_a\.bias is not supported"),
    ],
)
def test_other_models_are_refused_by_name(changes, words, folder, tmp_path):
    path = write(folder, tmp_path / "m.gguf", **changes)
    with pytest.raises(SmolseekError, match=words):
        GgufFile(path)
