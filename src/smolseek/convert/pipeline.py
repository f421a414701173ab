"""From a source to a finished folder: layer by layer, and not a trace of it when something goes wrong."""

import dataclasses
import functools
import json
import os
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.convert import compress, lossless, portable
from smolseek.convert import experts as mixture
from smolseek.convert.calibrate import calibration_rows, held_out_rows, statistics
from smolseek.convert.card import UNLIKE_CALIBRATION, measured_on, model_card
from smolseek.convert.conversion import Conversion
from smolseek.convert.prune import prune
from smolseek.convert.refit import refit
from smolseek.convert.source import Source, open_source
from smolseek.convert.sparse import Fitted, active_neurons, sparse, sparse_config
from smolseek.errors import SmolseekError, Stopped
from smolseek.files import atomic_folder, is_vacant, write_atomically
from smolseek.model.summary import count
from smolseek.storage import generation_config
from smolseek.storage.hf_config import config_to_hf
from smolseek.storage.hf_folder import load_causal_lm
from smolseek.storage.safetensors_file import ShardWriter
from smolseek.storage.weights import file_dtype

# Files of a Hugging Face folder that are taken over as they are: the tokenizer's, and others.
_TEXT = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_REST = (generation_config.NAME, "LICENSE")
_HELD_OUT_TOKENS = 2048
"""Tokens on which a compressed model is compared with its source."""
_SHARD_BYTES = 1_000_000_000

Attention = Callable[[int], dict[str, torch.Tensor]]
"""The new attention of a layer, named without the prefix `model.layers.N.self_attn.`."""


class Verify(Protocol):
    """Compares a new folder with its source."""

    def __call__(self, source: Path, out: Path, *, held_out: torch.Tensor | None) -> str:
        """Return the line of fidelity, or raise SmolseekError if the result is not to be kept.

        `held_out` are windows [N, T+1] of text that a compressed model was not fitted to; None where it must be exact.
        """


def convert(source: str, out: str | Path, conversion: Conversion, verify: Verify | None = None) -> Path:
    """Convert the Llama `source` (hub name, folder, .gguf file or smollm2) and return the folder `out`.

    `out` appears complete or not at all: it is written under another name, judged by `verify` and then renamed.
    Whatever can be known before the first layer is checked before it: options, source, tokenizer, `out`, text.

    Raises:
        SmolseekError: if the source cannot be converted, there is too little text, `out` is not free, the disk is
            full, or `verify` is not content.
        Stopped: for a KeyboardInterrupt; nothing is left.
    """
    out = Path(out)
    place = Path(os.path.realpath(out))  # of a link its target
    if not is_vacant(place):
        raise SmolseekError(f"{out} exists and is not empty: choose another folder, or delete it")
    with open_source(source, conversion.tokenizer) as opened:
        config = conversion.config(opened.config)
        needed = count(config).total * getattr(torch, conversion.dtype).itemsize
        needed *= 1 + (conversion.active is not None and verify is not None)  # the control stands beside it for a while
        try:
            with atomic_folder(place, last="config.json") as part:  # without which it is no model yet
                free = shutil.disk_usage(part).free
                if free < needed:
                    raise SmolseekError(
                        f"no space left for {out}: it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
                    )
                _write(source, opened, config, conversion, part, out, verify)
        except OSError as error:
            raise SmolseekError(f"{out} cannot be written ({error.strerror or error}): nothing is left of it") from None
        except KeyboardInterrupt:
            raise Stopped(f"interrupted: {out} was not written", 130) from None
    console.say(f"Wrote {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:,.0f} MB")
    return out


def _write(
    source: str,
    opened: Source,
    config: ModelConfig,
    conversion: Conversion,
    part: Path,
    out: Path,
    verify: Verify | None,
) -> None:
    """Fill the folder `part`, and verify it."""
    rows = held_out = None
    words = conversion.words()
    if conversion.mode == "compress":
        source_text, read_by = (opened.path, conversion.calibration), (opened.tokenizer, conversion.text_column)
        rows = calibration_rows(*source_text, conversion.calibration_tokens, conversion.seed, *read_by)
        if verify is not None:
            held_out = held_out_rows(*source_text, _HELD_OUT_TOKENS, conversion.seed, *read_by)
        # There may be less text than was asked for.
        words = dataclasses.replace(conversion, calibration_tokens=rows[:, 1:].numel()).words()
    attention: Attention = functools.partial(_exact_attention, opened)
    if rows is not None and (budget := conversion.budget(opened.config)) is not None:
        config, attention = _compressed(opened, budget, rows)
    elif conversion.mode == "compress":
        config = lossless.target_config(opened.config)
    layers = _layers(opened, config, attention, conversion)
    control_line = None
    if rows is not None and conversion.prune is not None:
        config, layers = _pruned(opened, config, layers, conversion.prune, rows)
    elif rows is not None and conversion.active is not None:
        ours, control = _sparse(opened, config, conversion, rows)
        if verify is not None:
            again = _replaced(_layers(opened, config, attention, conversion), control.layers)
            control_line = _control(
                opened, config, again, conversion, part, functools.partial(verify, held_out=held_out)
            )
        config = _shape(config, conversion)
        layers = _replaced(layers, ours.layers)
    if conversion.profile == "portable":
        config, layers = portable.one_epsilon(config, layers)
    values = _write_model(part, config, layers, conversion.dtype)
    console.say(
        f"Converted {config.num_hidden_layers} layers of {source} ({words}, {conversion.dtype}); "
        f"peak memory {_peak_bytes() / 1e6:,.0f} MB"
    )
    _write_text_files(opened, part, values, conversion.tokenizer is None)
    line = None
    if verify is not None:
        line = verify(opened.path, part, held_out=held_out)
        if held_out is not None:
            line += f", {measured_on(conversion.calibration)}"
        console.say(line)
        if control_line is not None:
            console.say(control_line)
            line = f"{line}. {control_line}"
    if held_out is not None:
        console.say(UNLIKE_CALIBRATION)
    command = shlex.join(["smolseek", "convert", source, str(out), *_words_of(conversion)])
    card = model_card(source, opened.path, opened.config, config, words, conversion.dtype, command, line)
    write_atomically(part / "README.md", card)


def _write_model(
    folder: Path, config: ModelConfig, layers: Iterator[dict[str, torch.Tensor]], dtype: str
) -> dict[str, Any]:
    """Write weights and config.json, and return the latter's values."""
    _write_weights(folder, layers, config.num_hidden_layers, getattr(torch, dtype))
    values = config_to_hf(config, dtype)
    write_atomically(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    return values


def _words_of(conversion: Conversion) -> list[str]:
    """Return the options that differ from their defaults, as on the command line."""
    words = []
    for field in dataclasses.fields(conversion):
        value = getattr(conversion, field.name)
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return words


def _exact_attention(opened: Source, n: int) -> dict[str, torch.Tensor]:
    """Return the attention of layer `n` as MLA, exactly."""
    q, k, v, o = (opened.tensors[f"model.layers.{n}.self_attn.{name}_proj.weight"].float() for name in "qkvo")
    return lossless.attention(opened.config, q, k, v) | {"o_proj.weight": o}


def _compressed(opened: Source, budget: compress.Budget, rows: torch.Tensor) -> tuple[ModelConfig, Attention]:
    """Return shape and attention of the model with a smaller cache, fitted on `rows` [N, T+1]."""
    model = load_causal_lm(opened.path)
    config, layers = compress.compress(model, budget, statistics(model, rows))
    if budget.method == "smolseek":
        layers = refit(model, config, layers, rows)
    console.say(
        f"Cache: {config.kv_lora_rank} features of latent and {config.qk_rope_head_dim} with position, "
        f"of {opened.config.cache_features} before"
    )
    layers = [compress.balanced(config, tensors) for tensors in layers]
    return config, layers.__getitem__


def _pruned(
    opened: Source, config: ModelConfig, layers: Iterator[dict[str, torch.Tensor]], share: float, rows: torch.Tensor
) -> tuple[ModelConfig, Iterator[dict[str, torch.Tensor]]]:
    """Return the shape with fewer neurons, and the layers with the feed-forward matrices of those that are kept."""
    kept = max(1, round(share * config.intermediate_size))
    found, errors = prune(load_causal_lm(opened.path), rows, kept)
    console.say(
        f"Neurons: {kept:,} of {config.intermediate_size:,} in each layer; relative squared error of a layer's output "
        f"{sum(errors) / len(errors):.3f} on average, {max(errors):.3f} at most"
    )

    return dataclasses.replace(config, intermediate_size=kept), _replaced(layers, found)


def _sparse(opened: Source, config: ModelConfig, conversion: Conversion, rows: torch.Tensor) -> tuple[Fitted, Fitted]:
    """Return the sparse experts, and the control: the same number of neurons, chosen once and for all."""
    shape = _shape(config, conversion)
    ours, control = sparse(load_causal_lm(opened.path), shape, rows, conversion.seed)
    active = active_neurons(shape)
    said = [f"{sum(one.errors) / len(one.errors):.3f}" for one in (ours, control)]
    console.say(
        f"Experts: {active:,} of {config.intermediate_size:,} neurons a token in each layer; relative squared error of "
        f"a layer's output {said[0]} on average; control, --prune {active / config.intermediate_size:.4g}: {said[1]}"
    )
    return ours, control


def _shape(config: ModelConfig, conversion: Conversion) -> ModelConfig:
    """Return the shape with sparse experts instead of the dense layers of `config`."""
    shared = 1 if conversion.shared is None else conversion.shared
    return sparse_config(config, conversion.experts or 0, shared, conversion.active or 0)


def _control(
    opened: Source,
    config: ModelConfig,
    layers: Iterator[dict[str, torch.Tensor]],
    conversion: Conversion,
    part: Path,
    verify: Callable[[Path, Path], str],
) -> str:
    """Return the line of fidelity of the control, whose folder in `part` is there only as long."""
    kept = active_neurons(_shape(config, conversion))
    with tempfile.TemporaryDirectory(dir=part, prefix="control") as folder:
        shape = dataclasses.replace(config, intermediate_size=kept)
        _write_model(Path(folder), shape, layers, conversion.dtype)
        return f"Control, --prune {kept / config.intermediate_size:.4g} instead: {verify(opened.path, Path(folder))}"


def _replaced(
    layers: Iterator[dict[str, torch.Tensor]], found: list[dict[str, torch.Tensor]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `layers` with the feed-forward tensors `found` instead of their own."""
    for n, tensors in enumerate(layers, -1):
        prefix = f"model.layers.{n}.mlp."
        if 0 <= n < len(found):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
            tensors |= {f"{prefix}{name}": tensor for name, tensor in found[n].items()}
        yield tensors


def _layers(
    opened: Source, config: ModelConfig, attention: Attention, conversion: Conversion
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the new tensors in float32: the embedding, layer after layer, and what follows the last."""

    def read(name: str) -> torch.Tensor:
        return opened.tensors[name].float()

    yield {"model.embed_tokens.weight": read("model.embed_tokens.weight")}
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        out = {f"{layer}{name}": read(f"{layer}{name}") for name in _UNCHANGED}
        out |= {f"{layer}self_attn.{name}": tensor for name, tensor in attention(n).items()}
        gate, up, down = (read(f"{layer}mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        if conversion.experts is None or conversion.mode == "compress":
            new = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        elif conversion.mode == "grow":
            new = mixture.grow(config, gate, up, down, seed=conversion.seed * config.num_hidden_layers + n)
        else:
            new = mixture.split(config, gate, up, down, neurons=conversion.neurons, seed=conversion.seed)
        yield out | {f"{layer}mlp.{name}": tensor for name, tensor in new.items()}
    last = {"model.norm.weight": read("model.norm.weight")}
    if not config.tie_word_embeddings:
        last["lm_head.weight"] = read("lm_head.weight")
    yield last


_UNCHANGED = ("input_layernorm.weight", "post_attention_layernorm.weight")


def _write_weights(part: Path, layers: Iterator[dict[str, torch.Tensor]], n_layers: int, dtype: torch.dtype) -> None:
    """Write the tensors to shards of at most a gigabyte, each as soon as it is full."""
    writer = ShardWriter(part, _SHARD_BYTES)
    with console.progress(n_layers, "converting") as bar:
        for done, tensors in enumerate(layers):
            for name, tensor in tensors.items():
                kind = file_dtype(name, dtype)
                writer.add((name, tensor.to(kind), kind))
            bar.update(min(done, n_layers))
    writer.finish()


def _write_text_files(opened: Source, part: Path, values: dict, own: bool) -> None:
    """Put tokenizer, chat template and generation settings beside the weights; the tokenizer may be another's."""
    source = opened.path
    if source.is_file() or not own:
        opened.tokenizer.save_pretrained(part)
    if source.is_dir():
        for name in (*(_TEXT if own else ()), *_REST):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
    if not (part / generation_config.NAME).exists():
        generation_config.write(part, values)


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
