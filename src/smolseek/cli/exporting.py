"""Command `smolseek export`."""

from collections.abc import Sequence
from dataclasses import dataclass

from smolseek.cli.arguments import parse
from smolseek.export.options import Export


@dataclass(frozen=True)
class ExportArgs(Export):
    """Write a model for other engines.

    The formats, and what each engine reads, are in docs/export.md.
    """

    model: str
    """A run folder, a model folder, a hub name, a .gguf file or `smollm2`."""
    out: str
    """File to write, which must not exist yet."""


def export(argv: Sequence[str]) -> None:
    """Carry out `smolseek export MODEL OUT`."""
    args = parse(ExportArgs, "export", argv)
    from smolseek.export import pipeline

    pipeline.export(args.model, args.out, args)
