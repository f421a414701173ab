"""Exports a model to a file or folder. The file or folder is written completely or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from smolseek import console
from smolseek.errors import SmolseekError, Stopped
from smolseek.export import gguf, hf, hub
from smolseek.export.card import model_card, obstacle
from smolseek.export.options import Export
from smolseek.export.source import check_tokenizer, open_source
from smolseek.files import atomic_file, atomic_folder, is_vacant
from smolseek.model.summary import count
from smolseek.storage.hf_folder import load_model, read_config


def export(target: str, out: str | Path, options: Export) -> Path:
    """Export the model `target` (see `load_model`) to the file or folder `out`, and return `out`.

    `out` is written completely or not at all. Options, model, tokenizer, `out` and disk space are checked before
    anything is written.

    Raises:
        SmolseekError: if the format does not support the model, `out` exists, or the export cannot be written or
            uploaded.
        Stopped: for a KeyboardInterrupt. No files are left, unless the export is complete and only its upload is
            interrupted.
    """
    out = Path(out)
    options.check(out)
    if options.push_to_hub is not None:
        hub.check(options.push_to_hub)
    if out.is_symlink() or not is_vacant(out) or (options.format == "gguf" and out.exists()):
        raise SmolseekError(f"{out} exists: choose another name, or delete it")
    try:
        (_export_gguf if options.format == "gguf" else _export_folder)(target, out, options)
    except KeyboardInterrupt:
        raise Stopped(f"interrupted: {out} was not written", 130) from None
    return out


def _export_gguf(target: str, out: Path, options: Export) -> None:
    source = open_source(target, options.tokenizer)
    plan = gguf.plan(source, options.quantize or "bf16", out.stem)
    with _writing(out, plan.nbytes), atomic_file(out) as part:
        gguf.write(part, plan)
    console.say(f"Wrote {out}: {out.stat().st_size / 1e6:,.0f} MB ({plan.description})")
    if options.push_to_hub is not None:
        title = options.push_to_hub.rpartition("/")[2]
        card = model_card(source.path, source.config, title, license_name=options.license, gguf=out.name)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / out.name).symlink_to(out.resolve())
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            _push(Path(folder), out, options)


def _export_folder(target: str, out: Path, options: Export) -> None:
    config = hf.exported_config(read_config(target), options)
    opened = load_model(target, tokenizer=options.tokenizer)
    if options.tokenizer is not None:
        check_tokenizer(opened.tokenizer, config, options.tokenizer)
    if why := obstacle(config):
        console.say(f"Note: the folder is not for vLLM and mlx-lm, because {why}")
    numbers = count(config).total + config.tie_word_embeddings * count(config).embedding  # a tied head is written, too
    nbytes = numbers * getattr(torch, options.dtype or "float32").itemsize
    title = options.push_to_hub or out.resolve().name
    with _writing(out, nbytes), atomic_folder(out, last="config.json") as folder:
        hf.write(folder, opened, options, title)
    console.say(f"Wrote {out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:,.0f} MB")
    if options.push_to_hub is not None:
        _push(out, out, options)


@contextmanager
def _writing(out: Path, needed: int) -> Iterator[None]:
    """Context that checks that `needed` bytes are free on the disk of `out`, and turns disk errors into one line."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            sizes = f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
            raise SmolseekError(f"no space left for {out}: {sizes}, so free some space, or choose another disk")
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SmolseekError(
            f"{out} cannot be written ({reason}): choose another folder (the unfinished files were deleted)"
        ) from None


def _push(folder: Path, out: Path, options: Export) -> None:
    """Upload the export to the repository that the options name."""
    repo = options.push_to_hub
    assert repo is not None
    console.say(f"Uploading to {repo}")
    try:
        console.say(f"Uploaded: {hub.push(folder, repo, public=options.public, written=out)}")
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted: {repo} was not uploaded, but {out} is complete: upload it with hf upload {repo} {out}", 130
        ) from None
