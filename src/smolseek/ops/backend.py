"""Chooses the backend of an operation: C on a CPU, Triton on a GPU, else PyTorch (`reference`).

The environment variable SMOLSEEK_BACKEND=reference, cpu or triton disables all other kernels.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smolseek import console
from smolseek.device import capability
from smolseek.errors import SmolseekError
from smolseek.ops import build

VARIABLE = "SMOLSEEK_BACKEND"
SOURCES = tuple(sorted(Path(__file__).parent.glob("*/cpu.c")))
"""The C files of all operations."""
TRITON: dict[torch.dtype, bool] = {}
"""Whether Triton's kernels agree with PyTorch on this machine, for each number format that has been tried.

The variable is global, because dynamo cannot trace through a cached function.
"""


@functools.cache
def override() -> str | None:
    """Return the backend that SMOLSEEK_BACKEND names, and log it once. Raises SmolseekError for an unknown name."""
    name = os.environ.get(VARIABLE) or None
    if name is not None:
        if name not in ("reference", "cpu", "triton"):
            raise SmolseekError(f"{VARIABLE}={name} is not a backend: use reference, cpu or triton, or unset it")
        kernels = (
            "PyTorch's operations only" if name == "reference" else f"{name} kernels and PyTorch's operations only"
        )
        console.warn(f"{VARIABLE}={name}: the model uses {kernels}")
    return name


def compiled(*sources: Path) -> ctypes.CDLL | None:
    """Return the C files `sources` as one library, or None if C files are disabled or cannot be built."""
    return build.library(*sources) if override() in (None, "cpu") else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled C files of all operations, or None without C files."""
    return compiled(*SOURCES)


@functools.cache
def has_bf16_products() -> bool:
    """Return whether the C files support bfloat16, which needs the processor's bfloat16 dot product (AVX512_BF16)."""
    functions = library()
    return functions is not None and bool(functions.has_bf16_products())


def c_supports(x: torch.Tensor) -> bool:
    """Return whether the C files support `x`: CPU tensors of float32, or bfloat16 with a multiple of 16 features."""
    if x.device.type != "cpu" or x.stride(-1) != 1 or torch.compiler.is_compiling():
        return False
    if type(x) not in (torch.Tensor, torch.nn.Parameter):  # a FakeTensor, for example, has no memory
        return False
    if x.dtype == torch.bfloat16:
        return x.shape[-1] % 16 == 0 and has_bf16_products()
    return x.dtype == torch.float32 and library() is not None


def c_infers(x: torch.Tensor) -> bool:
    """Return whether the C files for reading prompts support `x`, which must be bfloat16, in inference mode."""
    # The inference mode is checked last, because dynamo cannot trace this check. In compiled code `c_supports` is
    # False.
    return x.dtype == torch.bfloat16 and c_supports(x) and torch.is_inference_mode_enabled()


def triton_supports(x: torch.Tensor) -> bool:
    """Return whether the Triton kernels support `x`. float64 is excluded: the kernels use float32."""
    if not capability(x.device).triton or x.dtype == torch.float64:
        return False
    return TRITON[x.dtype] if x.dtype in TRITON else triton_runs(x.device, x.dtype)


def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Try the kernels on `device` in `dtype`. Warn if they fail, for example without a C compiler or on an old GPU."""
    TRITON[dtype] = False
    if importlib.util.find_spec("triton") is not None and override() in (None, "triton"):
        try:
            name = importlib.import_module("smolseek.ops.trial").disagreeing(device, dtype)
            problem = name and f"{name} computes something else"
        except Exception as error:  # Triton, the driver and the C compiler each raise exceptions of their own
            problem = next(iter(str(error).strip().splitlines()), type(error).__name__)
        TRITON[dtype] = problem is None
        if problem is not None:
            name = str(dtype).removeprefix("torch.")
            console.warn(f"Triton does not run here in {name}, so PyTorch's slower operations are used: {problem}")
    return TRITON[dtype]


def triton_operator(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Make a PyTorch operator of a Triton kernel, so that torch.compile does not trace the kernel.

    `allocate` returns empty tensors for the results. The function of the same name in `triton.py` of the same folder
    fills these tensors.
    """
    name = allocate.__name__

    def run(*arguments: Any) -> Any:
        results = allocate(*arguments)
        kernels = importlib.import_module(f"{allocate.__module__}.triton")
        getattr(kernels, name)(*arguments, *(results if isinstance(results, tuple) else (results,)))
        return results

    schema = torch.library.infer_schema(allocate, mutates_args=())
    operator = torch.library.custom_op(f"smolseek::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(allocate)
    return operator


def product_type(x: torch.Tensor) -> torch.dtype:
    """Return the number format of matrix multiplications with `x`: autocast's if autocast is enabled, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def triton_warps(numbers: int) -> int:
    """Return the number of warps for a program over `numbers` numbers: a power of two, about eight numbers a thread."""
    return min(16, 1 << (max(1, numbers // 256) - 1).bit_length())


def call(name: str, *arguments: torch.Tensor | int | float | None) -> None:
    """Call a C function. Tensors become pointers, ints become int64_t, and the number of threads is added last."""
    functions = library()
    assert functions is not None
    getattr(functions, name)(*map(_c_argument, (*arguments, torch.get_num_threads())))


def _c_argument(x: torch.Tensor | int | float | None) -> object:
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_void_p(None) if x is None else ctypes.c_int64(x)


def gradient_to_add_to(weight: torch.Tensor, accumulate: bool) -> torch.Tensor | None:
    """Return the `.grad` to which a backward pass may add the gradient of `weight`, or None if autograd must add it.

    Autograd allocates the gradient of each micro-batch and then adds it to `.grad`. For stacked experts and the
    embedding this memory traffic takes longer than the matrix multiplications. Autograd does not see a gradient that a
    backward pass adds itself, so only callers with `accumulate` get this addition.
    """
    if not (accumulate and weight.is_leaf and weight.requires_grad and weight.device.type == "cpu"):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
