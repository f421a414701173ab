"""Maps a model's parameters to the tensors in its files and back. Files store the experts of a stack one by one.

Files are written from views of the stacks, and read into views of the stacks, so that no second copy is needed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.model.local_shards import LocalShard, full_tensors
from smolseek.model.transformer import CausalLM
from smolseek.ops.quantized import expanded
from smolseek.storage.latent_norm import EPS, folded, rescaled, unfolded
from smolseek.storage.safetensors_file import FLOAT_TYPES

T = TypeVar("T")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def file_views(model: CausalLM) -> dict[str, torch.Tensor]:
    """Return views of the model's tensors under their names in a file, without a tied output head."""
    return dict(_views(full_tensors(model)))


def file_tensors(config: ModelConfig, shards: Mapping[str, LocalShard]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a file stores for `shards`. Only the shards of expert stacks may be partial.

    If a model has no norm of the latent, the file gets a norm that has no effect. Reading the file removes the norm
    exactly. The latents of a model with another `latent_norm_eps` are scaled to the epsilon of transformers.
    """
    tensors = rescaled(_views(shards), config, config.latent_norm_eps, EPS)
    return with_head(folded(tensors, config, reversible=True), config)


def with_head(tensors: Iterable[tuple[str, torch.Tensor]], config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `tensors`. If a DeepSeek model has a tied head, also yield the head, after the embedding.

    Other engines do not tie the head of a DeepSeek model. Without a head in the folder, mlx-lm ends with an error and
    vLLM generates empty text.
    """
    for name, tensor in tensors:
        yield name, tensor
        if name == EMBEDDING and config.tie_word_embeddings and config.model_type == "deepseek_v3":
            yield HEAD, tensor


def _views(shards: Mapping[str, LocalShard]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shard in shards.items():
        yield from unstacked(name, shard.tensor, shard.start)


def unstacked(name: str, tensor: torch.Tensor, first: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and views under which a file stores one tensor of a model.

    A stack of experts is stored as one tensor for each expert, numbered from `first` on. `experts.gate_up_proj`
    [E, 2F, D] becomes `experts.N.gate_proj.weight` and `experts.N.up_proj.weight` [F, D]. Every other stack
    `experts.X_proj` [E, ...] becomes `experts.N.X_proj.weight`, and `experts.X_bias` becomes `experts.N.X_proj.bias`.
    """
    stack = re.fullmatch(r"(.+\.mlp\.experts)\.(\w+)_(proj|bias)", name)
    if stack is None:
        yield name, tensor
        return
    prefix, matrix, kind = stack.groups()
    for n, expert in enumerate(tensor.unbind(), first):
        if matrix == "gate_up":
            gate, up = expert.chunk(2)
            yield f"{prefix}.{n}.gate_proj.weight", gate
            yield f"{prefix}.{n}.up_proj.weight", up
        else:
            yield f"{prefix}.{n}.{matrix}_proj.{'weight' if kind == 'proj' else 'bias'}", expert


def computed(tensors: Iterable[tuple[str, T]], values: Mapping[str, Any]) -> Iterator[tuple[str, T]]:
    """Leave out tensors that other programs store and smolseek does not use: RoPE tables and MTP layers.

    `values` is the content of config.json. MTP layers follow the other layers. The number of layers that are left
    out is the number of MTP layers in config.json, so that a wrong number of layers is still detected.
    """
    layers = values.get("num_hidden_layers") or 0
    extra = values.get("num_nextn_predict_layers") or values.get("num_mtp_layers") or 0
    known = isinstance(extra, int) and extra <= 1000  # any other value means a damaged file
    mtp = tuple(f"model.layers.{layers + k}." for k in range(extra if known else 0))
    return (pair for pair in tensors if not (pair[0].endswith("rotary_emb.inv_freq") or pair[0].startswith(mtp)))


def _targets(shards: Mapping[str, LocalShard]) -> dict[str, tuple[torch.Size, torch.Tensor | None, int]]:
    """Return for every tensor in a model's files its full shape, the view to copy into, and the first row to copy.

    The view is None for an expert that belongs to another process.
    """
    targets = {}
    for name, shard in shards.items():
        full = torch.empty(shard.full_length, *shard.tensor.shape[1:], device="meta")
        views = dict(unstacked(name, shard.tensor, shard.start))
        for file_name, tensor in unstacked(name, full):
            targets[file_name] = tensor.shape, views.get(file_name), shard.start if file_name == name else 0
    return targets


def check_shape(path: Path, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raise SmolseekError if a tensor in the files of `path` has another shape than the model expects."""
    if list(shape) != list(expected):
        raise SmolseekError(
            f"{path}: {name} has shape {list(shape)}, but config.json expects {list(expected)}: "
            "use config.json and weights of the same model"
        )


def check_shapes(config: ModelConfig, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    """Raise SmolseekError if the names or `shapes` of the tensors in the files of `path` do not match `config`.

    A tied embedding may be stored under the name of the head, or under both names.
    """
    with torch.device("meta"):
        stored = folded(file_views(CausalLM(config)).items(), config)
        expected = {name: tensor.shape for name, tensor in stored}
    tied = config.tie_word_embeddings
    for name, shape in expected.items():
        file_name = HEAD if tied and name == EMBEDDING and name not in shapes else name
        if file_name in shapes:
            check_shape(path, file_name, shapes[file_name], shape)
        elif shape.numel():
            raise SmolseekError(f"{path}: {name} is missing: copy or download the model again")
    for name in shapes:
        if name not in expected and not (tied and name == HEAD):
            raise SmolseekError(f"{path}: unknown tensor {name}: use config.json and weights of the same model")


def check_dtype(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise SmolseekError if a tensor in the files of `path` is quantised."""
    if tensor.dtype not in FLOAT_TYPES.values():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise SmolseekError(
            f"{path}: {name} is stored as {dtype}, which is not supported: use the model's bfloat16 or float32 version"
        )


def fill(
    config: ModelConfig, shards: Mapping[str, LocalShard], tensors: Iterable[tuple[str, torch.Tensor]], path: Path
) -> None:
    """Copy `tensors`, named as in the files of `path`, into `shards`.

    A tied matrix may be stored as the embedding, as the head, or as both. Raises SmolseekError for a tensor that is
    unknown or missing, or that has another shape or an unsupported type. Raises SmolseekError as well if the model ties
    the head to the embedding and the files hold two different matrices.
    """
    targets = _targets(shards)
    # Without shared experts their matrices are empty, and not every program writes empty tensors.
    missing = {name for name, (shape, _, _) in targets.items() if shape.numel()}
    for file_name, tensor in unfolded(tensors, config):
        name = EMBEDDING if file_name == HEAD and config.tie_word_embeddings else file_name
        if name not in targets:
            raise SmolseekError(f"{path}: unknown tensor {name}: use config.json and weights of the same model")
        shape, view, start = targets[name]
        check_shape(path, file_name, tensor.shape, shape)
        check_dtype(path, file_name, tensor)
        if view is not None:
            part = tensor[start : start + len(view)]
            if name == EMBEDDING and name not in missing:
                before, view = view, view.new_empty(view.shape)
                _copy(view, part)
                if not same_bits(view, before):
                    raise SmolseekError(
                        f"{path}: lm_head.weight differs from the embedding, but the model has tie_word_embeddings "
                        "true: set tie_word_embeddings to false in config.json"
                    )
            else:
                _copy(view, part)
        missing.discard(name)
    if missing:
        first = next(name for name in targets if name in missing)
        raise SmolseekError(
            f"{path}: {len(missing)} tensors are missing, the first is {first}: copy or download it again"
        )


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a weight; source and destination may be quantised."""
    target.copy_(expanded(source) if isinstance(target, torch.Tensor) else source)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two weights of one type hold the same numbers, to the last bit; NaN equals NaN."""
    return torch.equal(a.data.contiguous().view(torch.uint8), b.data.contiguous().view(torch.uint8))
