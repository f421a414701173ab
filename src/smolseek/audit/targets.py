"""Opens the TARGET of `smolseek audit`: a preset, a model or run of smolseek, another model folder, or a function."""

import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smolseek.audit.probe import Subject, call
from smolseek.config import DataConfig, parse_json
from smolseek.data.datasets import Corpus, open_dataset
from smolseek.errors import SmolseekError, reason
from smolseek.model.transformer import new_model
from smolseek.presets import PRESETS, preset
from smolseek.run_folder import RunFolder
from smolseek.storage.hf_config import ARCHITECTURES
from smolseek.storage.hf_folder import load_model, resolve
from smolseek.storage.stock_transformers import open_with_transformers, quiet
from smolseek.tokenizer import load_tokenizer


def is_function(name: str) -> bool:
    """Return whether `name` has the form package.module:function."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None and not Path(name).exists()


def import_function(name: str) -> Callable[..., Any]:
    """Import the function `package.module:function`. The current folder is searched first.

    Raises:
        SmolseekError: if the module cannot be imported, or has no such function.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # importing a user's module can raise anything
        raise SmolseekError(f"{name} cannot be imported ({reason(error)}): give package.module:function") from error
    if not callable(function):
        raise SmolseekError(f"{name} is a {type(function).__name__}, not a function: give package.module:function")
    return function


def open_subject(target: str, dtype: str = "auto") -> Subject:
    """Return the model that `target` names, in evaluation mode.

    Args:
        target: a preset (initial weights), a run folder, a checkpoint, a Hugging Face folder of any causal language
            model, a .gguf file, `smollm2`, or package.module:function, which returns a torch module.
        dtype: number format of the weights, with torch's name; `auto` keeps the number format of the file.

    Raises:
        SmolseekError: if the model does not exist, or does not map ids to logits.
    """
    if is_function(target):
        build = import_function(target)
        model = _build(build, target)
        return Subject(model=model, vocab=_vocab(model), build=lambda: _build(build, target))
    key = re.sub(r"[-.]", "_", target)
    if key in PRESETS and not Path(target).exists():
        config = preset(key)
        return Subject(
            model=new_model(config).to(torch.float32 if dtype == "auto" else getattr(torch, dtype)).eval(),
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            eos_id=next(iter(config.eos_ids), None),
            pad_id=config.pad_token_id,
            trained=False,
        )
    path = resolve(target)
    if path.is_dir() and _model_type(path) not in ARCHITECTURES:
        return _open_stock(target, path, dtype)
    loaded = load_model(target, dtype=dtype)
    subject = Subject(
        model=loaded.model,
        vocab=loaded.config.vocab_size,
        context=loaded.config.max_position_embeddings,
        tokenizer=loaded.tokenizer,
        eos_id=next(iter(loaded.config.eos_ids), None),
    )
    if path.parent.name == "checkpoints" and (run := RunFolder(path.parent.parent)).config.exists():
        subject.run, subject.config, subject.trained = run, run.read_config(), True
    return subject


def _open_stock(target: str, path: Path, dtype: str) -> Subject:
    """Open a model folder of another architecture with transformers, without remote code and pickles."""
    model = open_with_transformers(path, dtype, target, "copy or download it again")
    try:
        tokenizer = load_tokenizer(str(path))
    except SmolseekError:
        tokenizer = None
    with quiet():  # silences a warning of transformers about its choice of a loss
        loss = getattr(model, "loss_function", None)
    eos = model.config.eos_token_id
    return Subject(
        model=model,
        vocab=_vocab(model),
        context=getattr(model.config, "max_position_embeddings", None) or Subject.context,
        tokenizer=tokenizer,
        # In transformers, the collator masks padding, so there is no pad_id.
        loss=loss and (lambda logits, ids: loss(logits=logits, labels=ids, vocab_size=logits.shape[-1])),
        eos_id=eos[0] if isinstance(eos, list) else eos,
    )


def _build(build: Callable[[], Any], name: str) -> nn.Module:
    """Return the module that the function `name` builds, in evaluation mode."""
    try:
        model = build()
    except Exception as error:
        raise SmolseekError(f"{name}() failed ({reason(error)}): it must return a torch module") from error
    if not isinstance(model, nn.Module):
        raise SmolseekError(f"{name}() returned a {type(model).__name__}, not a torch module: return the model itself")
    return model.eval()


def _vocab(model: nn.Module) -> int:
    """Return the size of the vocabulary, which is the last dimension of the logits."""
    with torch.no_grad():
        return call(model, torch.zeros(1, 4, dtype=torch.int64)).shape[-1]


def _model_type(path: Path) -> str | None:
    try:
        return str(parse_json((path / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def open_text(data: Sequence[str], text_column: str = "text") -> Corpus:
    """Return training and validation documents from sources or from a function.

    Documents from sources are split as for training.

    A function package.module:function returns two lists of texts.

    Raises:
        SmolseekError: for sources that cannot be read, or a function that returns something else.
    """
    if len(data) != 1 or not is_function(data[0]):
        return open_dataset(DataConfig(sources=tuple(data), text_column=text_column))
    returned = import_function(data[0])()
    try:
        train, validation = (list(side) for side in returned)
        if not train or not validation or not all(isinstance(text, str) for text in [*train, *validation]):
            raise TypeError
    except (TypeError, ValueError):
        raise SmolseekError(
            f"{data[0]}() must return two lists of texts (training and validation), both not empty"
        ) from None
    return Corpus(train, validation)
