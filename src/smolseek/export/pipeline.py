"""From a model to a file, which is written completely or not at all."""

import shutil
from pathlib import Path

from smolseek import console
from smolseek.errors import SmolseekError, Stopped
from smolseek.export import gguf
from smolseek.export.options import Export
from smolseek.export.source import open_source
from smolseek.files import atomic_file


def export(target: str, out: str | Path, options: Export) -> Path:
    """Export the model `target` (as `load_model` takes it) to the file `out`, and return `out`.

    `out` appears complete or not at all. Options, model, tokenizer, `out` and disk space are checked before anything
    is written.

    Raises:
        SmolseekError: if the model cannot be expressed in the format, `out` exists, or it cannot be written.
        Stopped: for a KeyboardInterrupt; nothing is left.
    """
    out = Path(out)
    options.check_out(out)
    if out.exists() or out.is_symlink():
        raise SmolseekError(f"{out} exists: choose another name, or delete it")
    try:
        source = open_source(target, options.tokenizer)
        plan = gguf.plan(source, options.quantize, out.stem)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _require_space(out, plan.nbytes)
            with atomic_file(out) as part:
                gguf.write(part, plan)
        except OSError as error:
            raise SmolseekError(f"{out} cannot be written ({error.strerror or error}): nothing is left of it") from None
    except KeyboardInterrupt:
        raise Stopped(f"interrupted: {out} was not written", 130) from None
    console.say(f"Wrote {out}: {out.stat().st_size / 1e6:,.0f} MB ({plan.description})")
    return out


def _require_space(out: Path, needed: int) -> None:
    """Raise SmolseekError if the disk of `out` has less than `needed` bytes free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        sizes = f"it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
        raise SmolseekError(f"no space left for {out}: {sizes}: free some, or choose another disk")
