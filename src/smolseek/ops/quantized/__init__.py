"""Quantised weights, which stay in GGUF's blocks of 32 and are expanded for matrix multiplications.

A decoding step on a CPU multiplies the blocks themselves (`generate/cpu_decode.c`). Shapes: F rows, D columns, N ids.
"""

import torch
from torch import nn

from smolseek.ops import backend
from smolseek.ops.quantized import reference
from smolseek.ops.quantized.reference import BLOCK, BLOCK_BYTES

__all__ = ["BLOCK", "BLOCK_BYTES", "FORMATS", "QuantizedWeight", "expanded"]

FORMATS = ("float32", "bfloat16", "q8_0", "q4_0", "q4_1")
"""Number formats of a matrix, numbered as in quantized.h."""


class QuantizedWeight(nn.Module):
    """A quantised matrix [F, D], or a stack of such matrices, in place of a parameter. D is a multiple of 32.

    The class has the methods of a tensor that loading a model needs. Slices share the memory of the matrix.

    Args:
        data: the quantised blocks, [..., F, bytes of a row] (uint8).
        name: the number format: q8_0, q4_0 or q4_1.
        dtype: the number format of expanded weights: bfloat16 or float32.
    """

    data: torch.Tensor

    def __init__(self, data: torch.Tensor, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.name, self.dtype = name, dtype

    @classmethod
    def empty(cls, shape: torch.Size, name: str, dtype: torch.dtype) -> "QuantizedWeight":
        """Return an uninitialised quantised matrix for weights of this `shape`."""
        row_bytes = shape[-1] // BLOCK * BLOCK_BYTES[name]
        return cls(torch.empty(*shape[:-1], row_bytes, dtype=torch.uint8), name, dtype)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weights."""
        *matrices, row_bytes = self.data.shape
        return torch.Size([*matrices, row_bytes // BLOCK_BYTES[self.name] * BLOCK])

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.data.ndim

    @property
    def device(self) -> torch.device:
        """Device of the blocks."""
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: slice) -> "QuantizedWeight":
        return self._with(self.data[index])

    def unbind(self) -> list["QuantizedWeight"]:
        """Return the matrices of a stack."""
        return [self._with(data) for data in self.data.unbind()]

    def chunk(self, chunks: int) -> list["QuantizedWeight"]:
        """Split the rows of a matrix evenly."""
        return [self._with(data) for data in self.data.chunk(chunks)]

    def split(self, size: int) -> list["QuantizedWeight"]:
        """Split a matrix into parts of `size` rows; the last part may have fewer rows."""
        return [self._with(data) for data in self.data.split(size)]

    def new_empty(self, shape: torch.Size) -> "QuantizedWeight":
        """Return an uninitialised quantised matrix of the same number format."""
        return QuantizedWeight.empty(shape, self.name, self.dtype)

    def copy_(self, source: "torch.Tensor | QuantizedWeight") -> None:
        """Copy the weights of `source`, which are quantised unless they already have the same number format."""
        if isinstance(source, QuantizedWeight) and source.name == self.name:
            self.data.copy_(source.data)
        else:
            self.data.copy_(reference.quantize(expanded(source), self.name))

    def equal(self, other: "QuantizedWeight") -> bool:
        """Return whether both matrices have the same bytes."""
        return self.data.equal(other.data)

    def select(self, ids_N: torch.Tensor) -> torch.Tensor:
        """Return the rows `ids_N` (int64) of a matrix in `dtype` [N, D]."""
        return self._with(self.data[ids_N]).expand()

    def expand(self) -> torch.Tensor:
        """Return the weights in `dtype`."""
        if self.device.type != "cpu" or backend.library() is None:
            return reference.expand(self.data, self.name).to(self.dtype)
        data, out = self.data.contiguous(), torch.empty(self.shape, dtype=self.dtype)
        number = data.numel() // BLOCK_BYTES[self.name]
        backend.call("expand", data, number, FORMATS.index(self.name), out, self.dtype == torch.bfloat16)
        return out

    def _with(self, data: torch.Tensor) -> "QuantizedWeight":
        return QuantizedWeight(data, self.name, self.dtype)


def expanded(weight: "torch.Tensor | QuantizedWeight") -> torch.Tensor:
    """Return a weight as a tensor, expanded if it is quantised."""
    return weight.expand() if isinstance(weight, QuantizedWeight) else weight
