"""Folders as smolseek wrote them before it wrote them for other engines."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

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

    The model folder gets its old form, too.
    """
    for file in (checkpoint / TRAINING).iterdir():
        file.rename(checkpoint / file.name)
    (checkpoint / TRAINING).rmdir()
    (checkpoint / MANIFEST).unlink()
    make_old_folder(checkpoint)
    files = {file.name: manifest_entry(file) for file in sorted(checkpoint.iterdir())}
    (checkpoint / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
