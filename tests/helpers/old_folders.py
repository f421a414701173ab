"""Folders as smolseek wrote them before it wrote them for other engines."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import read_config
from smolseek.storage.manifest import MANIFEST, TRAINING, manifest_entry, manifest_text


def make_old_folder(folder: Path) -> None:
    """Drop a tied head and the old names of the RoPE settings from a model folder."""
    config, index = folder / "config.json", folder / "model.safetensors.index.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values = {name: value for name, value in values.items() if name not in ("rope_theta", "rope_scaling")}
    if values.pop("smolseek_tied_embeddings", False):
        values["tie_word_embeddings"] = True
        for file in folder.glob("model*.safetensors"):
            tensors = load_file(file)
            if tensors.pop("lm_head.weight", None) is not None:
                save_file(tensors, file, metadata={"format": "pt"})
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            del weight_map["lm_head.weight"]
            index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_old_checkpoint(checkpoint: Path) -> None:
    """Move the training state and the manifest of a checkpoint beside the model's files, and write the manifest again.

    The model folder gets its old form, and the tensors of the optimizer's state get their old names, too.
    """
    for file in (checkpoint / TRAINING).iterdir():
        file.rename(checkpoint / file.name)
    (checkpoint / TRAINING).rmdir()
    (checkpoint / MANIFEST).unlink()
    number_state(checkpoint)
    make_old_folder(checkpoint)
    files = {file.name: manifest_entry(file) for file in sorted(checkpoint.iterdir())}
    (checkpoint / MANIFEST).write_text(manifest_text(files), encoding="utf-8")


def make_old_config(file: Path) -> None:
    """Delete the options of the recipe that the config.json of an old run does not have."""
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["zero_init"], values["balance"]["averaging_fraction"]
    old = ("kind", "lr", "betas", "eps", "weight_decay", "clip", "z_loss")
    values["optim"] = {name: values["optim"][name] for name in old}
    file.write_text(json.dumps(values), encoding="utf-8")


def number_state(checkpoint: Path) -> None:
    """Give the tensors of the optimizer's state the numbers of their parameters in place of the names."""
    files = {file: load_file(file) for file in checkpoint.glob("training_state*.safetensors")}
    optimized = {name.rpartition(".")[0] for state in files.values() for name in state if name.startswith("optimizer.")}
    if not optimized:
        return
    with torch.device("meta"):
        model = CausalLM(read_config(checkpoint))
    numbers = {name: number for number, name in enumerate(old_order(model, is_muon(files.values())))}
    assert optimized == {f"optimizer.{name}" for name in numbers}
    for file, state in files.items():
        numbered = {}
        for name, tensor in state.items():
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            numbered[f"optimizer.{numbers[parameter]}.{key}" if parameter in numbers else name] = tensor
        save_file(numbered, file)


def old_order(model: CausalLM, muon: bool) -> list[str]:
    """Return the parameters in the order of the old groups: decayed matrices, no decay, single and double matrices."""
    decayed, plain, single, double = [], [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 1 or "embed_tokens" in name or name.endswith("_bias"):
            plain.append(name)
        elif muon and "lm_head" not in name and not name.endswith("mlp.gate.weight"):
            (double if "gate_up_proj" in name else single).append(name)
        else:
            decayed.append(name)
    return [*decayed, *plain, *single, *double]


def is_muon(states: Iterable[dict[str, torch.Tensor]]) -> bool:
    """Return whether Muon has updated some of the parameters."""
    return any("momentum_buffer" in name for state in states for name in state)
