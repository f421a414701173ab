"""attention.c, rows.c and rows_float.c: the operations of a training step on a CPU, between its products.

Those in bfloat16 are for processors that multiply pairs of it. Nothing depends on any of them: where they are not, the
model takes PyTorch's operations.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch

from smolseek import compiled, console

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.c", "rows.c", "rows_float.c"))
TRITON: bool | None = None
"""Whether Triton's kernels run here; None until the first tensor on a GPU asks. A plain name, which dynamo reads."""
_SUFFIX = {torch.bfloat16: "", torch.float32: "_float"}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled files, or None without a compiler."""
    found = compiled.library(*_SOURCES)
    if found is None:
        return None
    found.has_pairs.argtypes, found.has_pairs.restype = (), ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    rows = {
        "swiglu": (pointer,) * 2 + (number,) * 3 + (pointer, number),
        "swiglu_back": (pointer,) * 2 + (number,) * 3 + (pointer,) * 4 + (number,),
        "spread": (pointer,) * 2 + (number,) * 3 + (pointer, number),
        "gather": (pointer,) * 2 + (number,) * 3 + (pointer, number),
        "combine": (pointer,) * 3 + (number,) * 3 + (pointer, number),
        "combine_back": (pointer,) * 4 + (number,) * 3 + (pointer,) * 2 + (number,),
        "cross_entropy": (pointer,) * 2 + (number,) * 2 + (ctypes.c_float,) + (pointer,) * 2 + (number,),
    }
    functions: dict[str, tuple] = {f"{name}_float": arguments for name, arguments in rows.items()}
    if found.has_pairs():
        functions |= rows | {"attend_forward": (pointer,), "attend_backward": (pointer,)}
    for name, arguments in functions.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def on_gpu(x: torch.Tensor) -> bool:
    """Return whether `x` is for the kernels of `model/gpu.py` and `train/softmax.py`, which compute in float32."""
    if not x.is_cuda or x.dtype == torch.float64:
        return False
    return triton_runs(x.device) if TRITON is None else TRITON


def triton_runs(device: torch.device) -> bool:
    """Try a kernel on `device`: Triton may lack a C compiler, or not know the GPU. Said once; nothing depends on it."""
    global TRITON
    TRITON = False
    if importlib.util.find_spec("triton") is not None:
        try:
            from smolseek.model import gpu

            found = gpu.swiglu_back(torch.ones(1, 2, device=device), torch.ones(1, 1, device=device))
            TRITON = bool(found.isfinite().all())
        except Exception as error:  # its compiler's, the driver's, a C compiler's: each of kinds of its own
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            console.warn(f"Triton does not run here, so PyTorch's operations do, which only costs time: {reason}")
    return TRITON


def pairs() -> bool:
    """Return whether the kernels are there in bfloat16, too: the processor multiplies pairs of it."""
    found = kernels()
    return found is not None and bool(found.has_pairs())


def fit(x: torch.Tensor) -> bool:
    """Return whether the kernels take `x`: on a CPU, in float32 or in bfloat16 with rows of whole registers."""
    if x.device.type != "cpu" or x.stride(-1) != 1 or torch.compiler.is_compiling():
        return False
    if type(x) not in (torch.Tensor, torch.nn.Parameter):  # a FakeTensor's numbers, for one, lie nowhere
        return False
    if x.dtype == torch.bfloat16:
        return x.shape[-1] % 16 == 0 and pairs()
    return x.dtype == torch.float32 and kernels() is not None


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | float | None) -> None:
    """Call a function of rows.c or rows_float.c: tensors as where they lie, the number of threads last."""
    found = kernels()
    assert found is not None
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(found, name + _SUFFIX[dtype])(*plain, torch.get_num_threads())
