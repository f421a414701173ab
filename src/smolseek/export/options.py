"""The options of an export. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smolseek.errors import SmolseekError

Format = Literal["gguf"]
Quantize = Literal["f32", "bf16", "f16", "q8_0", "q5_1", "q4_1", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written."""

    format: Format = "gguf"
    """gguf is one file for llama.cpp and the programs that are built on it."""
    quantize: Quantize = "bf16"
    """Number format of the matrices (gguf). Norms, routers and biases are always float32."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: a folder, a .gguf file or a hub name of the same model."""

    def check_out(self, out: Path) -> None:
        """Raise SmolseekError if `out` cannot be the name of what is written."""
        if self.format == "gguf" and out.suffix != ".gguf":
            raise SmolseekError(f"{out}: the name of a GGUF file ends in .gguf: use {out.with_suffix('.gguf').name}")
