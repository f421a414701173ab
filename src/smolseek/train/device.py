"""Where a run computes, and in which number format."""

from contextlib import nullcontext

import torch

from smolseek.errors import SmolseekError


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; auto is CUDA where there is one.

    Raises:
        SmolseekError: when CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SmolseekError("--device cuda: no CUDA device is visible here: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """Return the context of the forward pass: bfloat16 products over float32 weights, or plain float32.

    auto is bfloat16 where the device multiplies in it; elsewhere its emulation would be slower than float32.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Private, so it may go: float32 is then the safe answer.
            supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            native = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and supported()
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
