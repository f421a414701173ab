"""What a device can do. Number formats, kernels and memory handling are chosen by these capabilities, not by names."""

from dataclasses import dataclass
from typing import Literal

import torch

from smolseek.errors import SmolseekError

Precision = Literal["float32", "bfloat16", "float16"]
"""Number format of matrix multiplications in training; all but float32 are autocast."""


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a device can do; the defaults are those of a plain CPU."""

    bfloat16: bool = False
    """Multiplies bfloat16 matrices in hardware; emulation would be slower than float32."""
    float16: bool = False
    """Multiplies float16 matrices several times faster than float32 matrices."""
    float64: bool = True
    """Computes in float64 at all."""
    grouped: frozenset[torch.dtype] = frozenset()
    """Number formats in which `F.grouped_mm` is one kernel. In other formats it waits for the host, and loops."""
    batches: bool = False
    """Computes a batch of small matrix multiplications faster than one after the other. On a CPU the loop is faster."""
    triton: bool = False
    """May run Triton kernels; `ops/backend.py` tries each number format first."""
    cuda_graphs: bool = False
    """Captures kernels as CUDA graphs."""
    pinned_memory: bool = False
    """Copies from pinned host memory while the host goes on."""

    def precision(self, name: str) -> Precision:
        """Return the precision that the option `--precision NAME` selects on this device."""
        if name == "auto":
            return "bfloat16" if self.bfloat16 else "float16" if self.float16 else "float32"
        return name  # type: ignore[return-value]

    def captures(self, dtype: torch.dtype, experts: bool) -> bool:
        """Return whether a micro-batch with matrix multiplications in `dtype` can be captured as a CUDA graph.

        The experts of a model must not wait for the host.
        """
        return self.cuda_graphs and (not experts or dtype in self.grouped)


_KNOWN: dict[str, Capability] = {}
"""Capabilities by device. A plain dictionary, because dynamo cannot trace through a cached function."""


def capability(device: torch.device) -> Capability:
    """Return what `device` can do."""
    name = str(device)
    if name not in _KNOWN:
        _KNOWN[name] = _capability(device)
    return _KNOWN[name]


def _capability(device: torch.device) -> Capability:
    if device.type == "cuda":
        return cuda_capability(
            torch.cuda.get_device_capability(device), torch.cuda.is_bf16_supported(including_emulation=False)
        )
    if device.type == "mps":
        return Capability(float64=False, batches=True)
    # A private function, which a later PyTorch may lack. Without it float32 is the safe choice.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return Capability(bfloat16=torch.backends.cpu.get_cpu_capability().startswith("AVX512") and supported())


def cuda_capability(version: tuple[int, int], bfloat16: bool) -> Capability:
    """Return what a CUDA device of compute capability `version` can do.

    Tensor cores for float16 exist since 7.0 (V100). `F.grouped_mm` has a kernel for bfloat16 only, in 9.0 and 10.x
    (H100, H200, B200); elsewhere it is a loop that waits for the host. The kernel of attention is chosen by
    `F.scaled_dot_product_attention` itself.
    """
    return Capability(
        bfloat16=bfloat16,
        float16=version >= (7, 0),
        grouped=frozenset((torch.bfloat16,) if version[0] in (9, 10) else ()),
        batches=True,
        triton=True,
        cuda_graphs=True,
        pinned_memory=True,
    )


def select(name: str) -> torch.device:
    """Return the device called `name`: cpu, cuda, mps, or auto, which is CUDA if there is a GPU, else the CPU.

    Raises:
        SmolseekError: if this machine or this PyTorch does not have the device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SmolseekError("--device cuda needs a CUDA device, but none is visible: use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise SmolseekError("--device mps needs an Apple GPU and a PyTorch for macOS: use --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
