"""The options of an export. This module does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smolseek.errors import SmolseekError

Format = Literal["gguf", "hf"]
Quantize = Literal["f32", "bf16", "f16", "q8_0", "q5_1", "q4_1", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """The options of an export."""

    format: Format = "gguf"
    """gguf is one file for llama.cpp and programs that use llama.cpp. hf is a folder for transformers, vLLM and
    mlx-lm."""
    quantize: Quantize | None = None
    """Number format of the matrices in a GGUF file, bf16 by default. Norms, routers and biases are always float32."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the weights in a folder, float32 by default."""
    pad_deepseek: bool = False
    """Pad the attention of a folder to DeepSeek's own sizes (latent 512, rotary 64, heads 128), for kernels that
    support only these sizes. The padded model computes the same function, but has a larger cache."""
    push_to_hub: str | None = None
    """Repository OWNER/NAME on the Hugging Face hub to upload the export to, with a model card. A repository that does
    not exist is created, private."""
    public: bool = False
    """Make the created repository public."""
    license: str | None = None
    """Licence in the model card, in the hub's spelling, such as apache-2.0; by default the licence of the source."""
    tokenizer: str | None = None
    """Folder, .gguf file or hub name of the same model, whose tokenizer replaces the model's own."""

    def check(self, out: Path) -> None:
        """Raise SmolseekError for options that do not fit together, or that do not fit the type of `out`."""
        other = {"gguf": ("dtype", "pad_deepseek"), "hf": ("quantize",)}[self.format]
        for name in other:
            if getattr(self, name):
                raise SmolseekError(
                    f"--{name.replace('_', '-')} is not an option of --format {self.format}: leave out this option"
                )
        if self.public and self.push_to_hub is None:
            raise SmolseekError("--public needs --push-to-hub OWNER/NAME: add --push-to-hub, or leave out --public")
        if self.format == "gguf" and out.suffix != ".gguf":
            raise SmolseekError(
                f"{out} is not the name of a GGUF file, which ends in .gguf: use "
                f"{out.stem.strip('.') or 'model'}.gguf, or --format hf"
            )
