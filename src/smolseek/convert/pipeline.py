"""Converts a source model to a finished folder, layer by layer. After an error no files are left."""

import dataclasses
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.convert import lossless
from smolseek.convert.calibrate import calibration_sequences, statistics
from smolseek.convert.card import CALIBRATION_TEXT, UNLIKE_CALIBRATION, model_card
from smolseek.convert.compress import balanced, compress
from smolseek.convert.conversion import Conversion
from smolseek.convert.experts import FeedForward, grow, split, with_experts
from smolseek.convert.least_squares import refit_values
from smolseek.convert.source import Source, open_source
from smolseek.convert.sparse import active_neurons, prune, sparse
from smolseek.errors import SmolseekError, Stopped
from smolseek.files import atomic_folder, is_vacant, write_atomically
from smolseek.memory import peak_resident_bytes
from smolseek.model.summary import count
from smolseek.storage import latent_norm
from smolseek.storage.hf_folder import load_causal_lm, write_metadata
from smolseek.storage.safetensors_file import write_shards
from smolseek.storage.weights import with_head

_TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]
_TOKENIZER_FILES += ["added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]
_COPIED_FILES = ["generation_config.json", "LICENSE"]
_COMPARED_TOKENS = 2048
"""Number of tokens on which a compressed model is compared with its source."""

Tensors = dict[str, torch.Tensor]


class _Model(NamedTuple):
    """A model to be written. Each layer is computed in float32 when it is written."""

    config: ModelConfig
    attention: Callable[[int], Tensors]
    """Layer number -> tensors named without the prefix `model.layers.N.self_attn.`."""
    feed_forward: Callable[[int], Tensors]
    """Layer number -> tensors named without the prefix `model.layers.N.mlp.`."""


Verify = Callable[[Path, Path, torch.Tensor | None], str]
"""Compares a new folder with its source and returns a line with the result. Raises SmolseekError to reject the folder.

The arguments are the source, the folder, and held-out sequences [N, T+1]. The sequences are None for an exact model.
"""


def convert(source: str, out: str | Path, conversion: Conversion, verify: Verify | None = None) -> Path:
    """Convert the Llama `source` (hub name, folder, .gguf file or smollm2) and return the folder `out`.

    The folder is written under a temporary name, checked by `verify` and then renamed, so `out` is never incomplete.
    Options, source, tokenizer, `out`, disk space and calibration text are checked before the first layer is converted.

    Raises:
        SmolseekError: if the source cannot be converted, the calibration text is too short, `out` is not empty, the
            disk is full, or `verify` rejects the result.
        Stopped: for a KeyboardInterrupt; no files are left.
    """
    out = Path(out)
    target = Path(os.path.realpath(out))  # `out` may be a symbolic link
    if not is_vacant(target):
        raise SmolseekError(f"{out} exists and is not empty: choose another folder, or delete it")
    opened = open_source(source, conversion.tokenizer)
    if conversion.smaller_cache:
        conversion.check_cache(opened.config)
    config = with_experts(lossless.target_config(opened.config), conversion)
    numbers = count(config).total + config.tie_word_embeddings * count(config).embedding  # a tied head is written, too
    needed = numbers * getattr(torch, conversion.dtype).itemsize
    needed *= 1 + (conversion.active is not None and verify is not None)  # the control model, too
    try:
        with atomic_folder(target, last="config.json") as folder:  # makes it a model
            free = shutil.disk_usage(folder).free
            if free < needed:
                sizes = f"it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
                raise SmolseekError(f"no space left for {out}: {sizes}, so free some space, or choose another disk")
            _fill(folder, source, opened, conversion, out, verify)
    except OSError as error:
        reason = error.strerror or error
        raise SmolseekError(
            f"{out} cannot be written ({reason}): choose another folder (the unfinished files were deleted)"
        ) from None
    except KeyboardInterrupt:
        raise Stopped(f"interrupted: {out} was not written", 130) from None
    console.say(f"Wrote {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:,.0f} MB")
    return out


def _fill(folder: Path, source: str, opened: Source, conversion: Conversion, out: Path, verify: Verify | None) -> None:
    """Convert the source into `folder`, which the caller renames to `out`, and verify the result."""
    model, control, held_out, mode = _exact(opened, conversion), None, None, conversion.description()
    if conversion.mode == "compress":
        options = conversion.seed, opened.tokenizer, conversion.text_column
        path, text = opened.path, conversion.calibration
        sequences = calibration_sequences(path, text, conversion.calibration_tokens, *options)
        if verify is not None:
            held_out = calibration_sequences(path, text, _COMPARED_TOKENS, *options, held_out=True)
        # There may be less text than `calibration_tokens`.
        mode = dataclasses.replace(conversion, calibration_tokens=sequences[:, 1:].numel()).description()
        model, control = _compressed(model, opened, conversion, sequences)
    config = _write_model(folder, opened, model, conversion)
    console.say(
        f"Converted {config.num_hidden_layers} layers of {source} ({mode}, {conversion.dtype}); "
        f"peak memory {peak_resident_bytes() / 1e6:,.0f} MB"
    )
    fidelity = None
    if verify is not None:
        fidelity = verify(opened.path, folder, held_out)
        if held_out is not None:
            text = CALIBRATION_TEXT.get(conversion.calibration, conversion.calibration)
            fidelity += f", measured on {text}, a part that the calibration did not see"
        console.say(fidelity)
        if control is not None:
            share = control.config.intermediate_size / opened.config.intermediate_size
            with tempfile.TemporaryDirectory(dir=folder, prefix="control") as beside:
                _write_model(Path(beside), opened, control, conversion)
                line = f"Control model, --prune {share:.4g}: {verify(opened.path, Path(beside), held_out)}"
            console.say(line)
            fidelity += f". {line}"
    if held_out is not None:
        console.say(UNLIKE_CALIBRATION)
    command = shlex.join(["smolseek", "convert", source, str(out), *conversion.arguments()])
    card = model_card(source, opened, config, f"{mode}; {conversion.dtype}", command, fidelity)
    write_atomically(folder / "README.md", card)


def _exact(opened: Source, conversion: Conversion) -> _Model:
    """Return the model that computes the same function as the source. In compress mode all layers stay dense."""
    config = lossless.target_config(opened.config)
    if conversion.mode != "compress":
        config = with_experts(config, conversion)

    def attention(n: int) -> Tensors:
        q, k, v, o = (opened.read(f"model.layers.{n}.self_attn.{name}_proj.weight") for name in "qkvo")
        return lossless.attention(opened.config, q, k, v) | {"o_proj.weight": o}

    def feed_forward(n: int) -> Tensors:
        names = (f"model.layers.{n}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        dense = FeedForward(*map(opened.read, names))
        if conversion.mode == "grow":
            return grow(config, dense, seed=conversion.seed * config.num_hidden_layers + n)
        if config.n_routed_experts:
            return split(config, dense, conversion.neurons, conversion.seed)
        return dense.tensors()

    return _Model(config, attention, feed_forward)


def _compressed(
    model: _Model, opened: Source, conversion: Conversion, sequences: torch.Tensor
) -> tuple[_Model, _Model | None]:
    """Return a smaller version of the exact `model`, fitted on `sequences` [N, T+1], and a control model or None.

    A control model is made for sparse experts: it has as many active neurons, but the same neurons for every token.
    """
    llama, dense = load_causal_lm(opened.path), model.config.intermediate_size
    if conversion.smaller_cache:
        config, attentions = compress(llama, conversion, statistics(llama, sequences))
        if conversion.method == "smolseek":
            attentions = refit_values(llama, config, attentions, sequences)
        console.say(
            f"Cache: {config.kv_lora_rank} latent and {config.qk_rope_head_dim} rotary features per token and layer, "
            f"instead of {opened.config.cache_features}"
        )
        attentions = [balanced(config, tensors) for tensors in attentions]
        model = model._replace(config=config, attention=attentions.__getitem__)
    if conversion.prune is not None:
        neurons = max(1, round(conversion.prune * dense))
        pruned = prune(llama, sequences, neurons)
        errors = [error for _, error in pruned]
        console.say(
            f"Neurons: {neurons:,} of {dense:,} in each layer; relative squared error of a layer's output "
            f"{fmean(errors):.3f} on average, {max(errors):.3f} at most"
        )
        return _with_neurons(model, neurons, pruned), None
    if conversion.active is None:
        return model, None
    config = with_experts(model.config, conversion)
    experts, control = sparse(llama, config, sequences, conversion.seed)
    neurons = active_neurons(config)
    means = [fmean(error for _, error in layers) for layers in (experts, control)]
    console.say(
        f"Experts: {neurons:,} of {dense:,} neurons per token in each layer; relative squared error of a "
        "layer's output "
        f"{means[0]:.3f} on average; of the control model, --prune {neurons / dense:.4g}: {means[1]:.3f}"
    )
    sparse_model = model._replace(config=config, feed_forward=lambda n: experts[n][0])
    return sparse_model, _with_neurons(model, neurons, control)


def _with_neurons(model: _Model, neurons: int, layers: list[tuple[FeedForward, float]]) -> _Model:
    """Return the model with dense `layers` of fewer neurons."""
    config = dataclasses.replace(model.config, intermediate_size=neurons)
    return model._replace(config=config, feed_forward=lambda n: layers[n][0].tensors())


def _write_model(folder: Path, opened: Source, model: _Model, conversion: Conversion) -> ModelConfig:
    """Write weights, configuration files and tokenizer, and return the configuration of the written model."""
    config, tensors = model.config, _tensors(opened, model)
    if conversion.portable:
        config, tensors = lossless.one_epsilon(config, tensors)
    dtype, bias = getattr(torch, conversion.dtype), "e_score_correction_bias"
    # The router biases stay float32, because training changes them in steps below the precision of bfloat16.
    stored = latent_norm.folded(tensors, config)
    typed = ((name, tensor if name.endswith(bias) else tensor.to(dtype)) for name, tensor in stored)
    write_shards(folder, with_head(typed, config))
    source = opened.path
    same_tokenizer = source.is_dir() and conversion.tokenizer is None
    write_metadata(folder, config, dtype, None if same_tokenizer else opened.tokenizer)
    if source.is_dir():
        for name in _COPIED_FILES + (_TOKENIZER_FILES if same_tokenizer else []):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    return config


def _tensors(opened: Source, model: _Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the new tensors in float32: the embedding, layer after layer, the last norm, and an untied output head."""
    layers, tied = model.config.num_hidden_layers, model.config.tie_word_embeddings
    yield "model.embed_tokens.weight", opened.read("model.embed_tokens.weight")
    with console.progress(layers, "converting") as bar:
        for n in range(layers):
            prefix = f"model.layers.{n}."
            for part, tensors in (("self_attn", model.attention(n)), ("mlp", model.feed_forward(n))):
                yield from ((f"{prefix}{part}.{name}", tensor) for name, tensor in tensors.items())
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                yield prefix + name, opened.read(prefix + name)
            bar.update(n + 1)
    for name in ("model.norm.weight",) if tied else ("model.norm.weight", "lm_head.weight"):
        yield name, opened.read(name)
