"""attention.c and rows.c: the operations of a training step on a CPU whose products are in bfloat16.

Nothing depends on them: without a compiler or such a processor the model takes PyTorch's operations.
"""

import ctypes
import functools
from pathlib import Path

import torch

from smolseek import compiled

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.c", "rows.c"))


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled files, or None without a compiler or a processor that multiplies pairs of bfloat16."""
    found = compiled.library(*_SOURCES)
    if found is None:
        return None
    found.has_pairs.argtypes, found.has_pairs.restype = (), ctypes.c_int64
    if not found.has_pairs():
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in {
        "attend_forward": (pointer,),
        "attend_backward": (pointer,),
        "swiglu": (pointer,) * 2 + (number,) * 3 + (pointer, number),
        "swiglu_back": (pointer,) * 2 + (number,) * 3 + (pointer,) * 4 + (number,),
        "spread": (pointer,) * 2 + (number,) * 3 + (pointer, number),
        "gather": (pointer,) * 2 + (number,) * 3 + (pointer, number),
        "combine": (pointer,) * 3 + (number,) * 3 + (pointer, number),
        "combine_back": (pointer,) * 4 + (number,) * 3 + (pointer,) * 2 + (number,),
        "cross_entropy": (pointer,) * 2 + (number,) * 2 + (ctypes.c_float,) + (pointer,) * 2 + (number,),
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def fit(x: torch.Tensor, multiple: int = 16) -> bool:
    """Return whether `x` is on a CPU, in bfloat16, with rows of whole registers, and the kernels are there."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.shape[-1] % multiple == 0
        and x.stride(-1) == 1
        and kernels() is not None
    )


def call(name: str, *arguments: torch.Tensor | int | float | None) -> None:
    """Call a function of rows.c: tensors as where they lie, the number of threads last."""
    found = kernels()
    assert found is not None
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(found, name)(*plain, torch.get_num_threads())
