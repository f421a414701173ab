"""Writing safetensors one tensor at a time, so that saving needs no second copy of a model, and reading them safely.

The format: the header's length (8 bytes, little-endian), a JSON header with the type, shape and place of each tensor,
and the tensors' bytes.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import safetensors
import torch

from smolseek.errors import SmolseekError

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
FLOAT_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items() if dtype.is_floating_point}

# A tensor to be written: its name, the tensor (a view will do, on any device), and the type it takes in the file.
Entry = tuple[str, torch.Tensor, torch.dtype]


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write `entries` to `path`. Raises OSError, for a full disk for one."""
    # Wide types first: every tensor then lies at a multiple of its own item size, which mapping readers want.
    ordered = sorted(entries, key=lambda e: (-e[2].itemsize, e[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor, dtype in ordered:
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor, dtype in ordered:
            if tensor.numel():
                flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of an unreadable file into a SmolseekError that names it."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SmolseekError(f"{path} is damaged or unreadable ({reason}): copy or download it anew") from None


def types(path: Path) -> dict[str, str]:
    """Return the type names ("F32") of the tensors in `path`, from its header alone."""
    with damage_named(path), safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def pieces(path: Path, name: str, rows: int = 4096) -> Iterator[torch.Tensor]:
    """Yield the tensor `name` of a file by `rows` rows at a time."""
    with damage_named(path), safetensors.safe_open(path, framework="pt") as file:
        tensor = file.get_slice(name)
        for start in range(0, tensor.get_shape()[0], rows):
            yield tensor[start : start + rows]


def read(paths: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of all files. The tensors lie in mapped memory: copy what is to outlive the file."""
    for path in paths:
        with contextlib.ExitStack() as stack:
            # The guard stands around each read alone: an error of the consumer is none of this file.
            with damage_named(path):
                file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                names = list(file.keys())
            for name in names:
                with damage_named(path):
                    tensor = file.get_tensor(name)
                yield name, tensor
