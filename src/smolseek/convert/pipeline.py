"""From a source to a finished folder: layer by layer, and not a trace of it when something goes wrong."""

import dataclasses
import functools
import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.convert import compress, lossless
from smolseek.convert import experts as mixture
from smolseek.convert.calibrate import calibration_rows, statistics
from smolseek.convert.card import model_card
from smolseek.convert.compress import Method
from smolseek.convert.experts import Neurons
from smolseek.convert.refit import refit
from smolseek.convert.source import Source, open_source
from smolseek.errors import SmolseekError
from smolseek.model.summary import count
from smolseek.run_folder import write_text
from smolseek.storage import safetensors_file
from smolseek.storage.hf_config import config_to_hf
from smolseek.storage.hf_folder import INDEX, WEIGHTS, load_model
from smolseek.tokenizer import load_tokenizer

# Files of a Hugging Face folder that belong to the text, not the weights: they are taken over as they are.
_TAKEN_OVER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
_SHARD_BYTES = 1_000_000_000

Attention = Callable[[int], dict[str, torch.Tensor]]
"""The new attention of a layer, named without the prefix `model.layers.N.self_attn.`."""


_COMPRESSING = ("cache", "kv_rank", "rope_dim", "method", "freq_fold", "calibration", "calibration_tokens")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of the source."""

    mode: Literal["exact", "grow", "compress"] = "exact"
    """`exact` computes what the source computes; `grow` does so with new experts beside, to be trained; `compress`
    comes near it with a smaller cache."""
    experts: int | None = None
    """Routed experts: parts of the dense layers (exact) or new ones (grow); None leaves the layers dense."""
    shared: int | None = None
    """Shared experts; None is 1."""
    neurons: Neurons = "contiguous"
    """How the neurons are dealt out to the experts (exact)."""
    top_k: int | None = None
    """Routed experts that a token visits (grow)."""
    cache: float | None = None
    """Share of the source's cache that is kept (compress)."""
    kv_rank: int | None = None
    """Features of the latent (compress, with `rope_dim`, instead of `cache`)."""
    rope_dim: int | None = None
    """Rotary features; None has them searched, or is one head's for the published method (compress)."""
    method: Method = "smolseek"
    """`transmla` is the published method, to compare with (compress)."""
    freq_fold: int = 1
    """Adjacent frequencies that are treated as one (compress)."""
    calibration: str = "builtin"
    """Text that the smaller cache is fitted to: `builtin`, files, or `self`, which the source writes (compress)."""
    calibration_tokens: int = 16_384
    """Tokens of it (compress)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    seed: int = 0
    """Seed of the clustering, of the new experts and of the text that the source writes."""

    def __post_init__(self) -> None:
        if self.mode == "compress":
            self._check_compression()
            return
        for name in _COMPRESSING:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise SmolseekError(f"--{name.replace('_', '-')} belongs to --mode compress: add that, or leave it out")
        if self.mode == "grow":
            if self.experts is None or self.top_k is None:
                raise SmolseekError("--mode grow needs --experts E and --top-k K: for example --experts 4 --top-k 2")
            if self.neurons != "contiguous":
                raise SmolseekError("--neurons clustered belongs to --mode exact: grow keeps the whole layer together")
        else:
            if self.top_k is not None:
                raise SmolseekError(f"--top-k {self.top_k} belongs to --mode grow: in an exact split all are active")
            if self.experts is None and (self.shared is not None or self.neurons != "contiguous"):
                raise SmolseekError("--shared and --neurons need --experts E: without it the layers stay dense")

    def _check_compression(self) -> None:
        if self.experts is not None or self.shared is not None or self.top_k is not None:
            raise SmolseekError("--mode compress leaves the layers dense: --experts belongs to --mode exact and grow")
        if self.neurons != "contiguous":
            raise SmolseekError("--neurons clustered belongs to --mode exact: compress leaves the layers dense")
        if (self.cache is None) == (self.kv_rank is None):
            raise SmolseekError("--mode compress needs --cache SHARE, or --kv-rank R and --rope-dim D: --cache 0.5")
        if self.kv_rank is not None and self.rope_dim is None:
            raise SmolseekError(f"--kv-rank {self.kv_rank} needs --rope-dim D beside it: for example 48")
        if self.cache is not None and not 0 < self.cache < 1:
            raise SmolseekError(f"--cache {self.cache} is no share between 0 and 1: 0.5 halves the cache")
        for name in ("kv_rank", "rope_dim", "freq_fold", "calibration_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SmolseekError(f"--{name.replace('_', '-')} {value} is below 1: use a positive number")

    def budget(self, source: ModelConfig) -> int:
        """Return the features of the smaller cache, of a token and layer."""
        if self.cache is not None:
            return round(self.cache * source.cache_features)
        return (self.kv_rank or 0) + (self.rope_dim or 0)

    def config(self, source: ModelConfig) -> ModelConfig:
        """Return the exact shape, experts included. Raises SmolseekError if the experts do not fit."""
        config = lossless.target_config(source)
        if self.experts is None:
            return config
        shared = 1 if self.shared is None else self.shared
        if self.mode == "grow":
            return mixture.grow_config(config, self.experts, shared, self.top_k or 0)
        return mixture.split_config(config, self.experts, shared)

    def words(self) -> str:
        """Return the mode in a few words."""
        shared = 1 if self.shared is None else self.shared
        if self.mode == "compress":
            return f"compress, {self.method}, calibrated on {self.calibration_tokens:,} tokens of {self.calibration}"
        if self.mode == "grow":
            return f"grow, {shared} shared and {self.experts} new routed experts, top-{self.top_k}"
        if self.experts is None:
            return "exact, dense feed-forward layers"
        return f"exact, {shared} shared and {self.experts} routed experts, {self.neurons} neurons, all active"


def convert(
    source: str, out: str | Path, conversion: Conversion, verify: Callable[[Path, Path], str] | None = None
) -> Path:
    """Convert the Llama `source` (hub name, folder, .gguf file or smollm2) and return the folder `out`.

    `out` appears complete or not at all: it is written under another name, judged by `verify`, which takes the
    source's path and the new folder and returns the line of fidelity or raises, and then renamed.

    Raises:
        SmolseekError: if the source cannot be converted, `out` is not free, the disk is full, the user interrupts, or
            `verify` is not content.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SmolseekError(f"{out} exists and is not empty: choose another folder, or delete it")
    with open_source(source) as opened:
        config = conversion.config(opened.config)
        part = out.with_name(f".{out.name}.unfinished")
        needed = count(config).total * getattr(torch, conversion.dtype).itemsize
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)  # left by a conversion that was killed
            free = shutil.disk_usage(out.parent).free
            if free < needed:
                raise SmolseekError(
                    f"no space left for {out}: it takes {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
                )
            part.mkdir()
            return _write(source, opened, config, conversion, part, out, verify)
        except OSError as error:
            raise SmolseekError(f"{out} cannot be written ({error.strerror or error}): nothing is left of it") from None
        except KeyboardInterrupt:
            raise SmolseekError(f"interrupted: {out} was not written") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write(
    source: str,
    opened: Source,
    config: ModelConfig,
    conversion: Conversion,
    part: Path,
    out: Path,
    verify: Callable[[Path, Path], str] | None,
) -> Path:
    """Fill the folder `part`, verify it and rename it to `out`."""
    attention: Attention = functools.partial(_exact_attention, opened)
    if conversion.mode == "compress":
        config, attention = _compressed(opened, conversion)
    _write_weights(
        part, _layers(opened, config, attention, conversion), config.num_hidden_layers, getattr(torch, conversion.dtype)
    )
    console.say(
        f"Converted {config.num_hidden_layers} layers of {source} ({conversion.words()}, {conversion.dtype}); "
        f"peak memory {_peak_bytes() / 1e6:,.0f} MB"
    )
    values = config_to_hf(config, conversion.dtype)
    write_text(part / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    _write_text_files(opened.path, part, values)
    line = None
    if verify is not None:
        line = verify(opened.path, part)
        console.say(line)
    command = " ".join(["smolseek convert", source, str(out), *_words_of(conversion)])
    card = model_card(source, opened.path, opened.config, config, conversion.words(), conversion.dtype, command, line)
    write_text(part / "README.md", card)
    part.rename(out)
    console.say(f"Wrote {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:,.0f} MB")
    return out


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


def _compressed(opened: Source, conversion: Conversion) -> tuple[ModelConfig, Attention]:
    """Return shape and attention of the model with the smaller cache.

    Raises:
        SmolseekError: if the budget cannot be spent, or there is not enough text to calibrate with.
    """
    budget = compress.Budget(
        conversion.budget(opened.config), conversion.rope_dim, conversion.method, conversion.freq_fold
    )
    budget.check(opened.config)
    rows = calibration_rows(opened.path, conversion.calibration, conversion.calibration_tokens, conversion.seed)
    model = load_model(opened.path).model
    config, layers = compress.compress(model, budget, statistics(model, rows))
    if conversion.method == "smolseek":
        layers = refit(model, config, layers, rows)
    console.say(
        f"Cache: {config.kv_lora_rank} features of latent and {config.qk_rope_head_dim} with position, "
        f"of {opened.config.cache_features} before"
    )
    layers = [compress.balanced(config, tensors) for tensors in layers]
    return config, layers.__getitem__


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
        if conversion.experts is None:
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
    """Write the tensors to shards of at most a gigabyte and a layer, each as soon as it is full."""
    places: dict[str, int] = {}
    shard: list[safetensors_file.Entry] = []
    size = total = shards = 0

    def flush() -> None:
        nonlocal shard, size, total, shards
        safetensors_file.write(part / f"shard-{shards}", shard)
        places.update({name: shards for name, _, _ in shard})
        shard, total, size, shards = [], total + size, 0, shards + 1

    with console.progress(n_layers, "converting") as bar:
        for done, tensors in enumerate(layers):
            for name, tensor in tensors.items():
                kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
                shard.append((name, tensor.to(kind), kind))
                size += tensor.numel() * kind.itemsize
            if size >= _SHARD_BYTES:
                flush()
            bar.update(min(done, n_layers))
        if shard:
            flush()
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)] if shards > 1 else [WEIGHTS]
    for n, name in enumerate(names):
        (part / f"shard-{n}").rename(part / name)
    if shards > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[n] for name, n in sorted(places.items())},
        }
        write_text(part / INDEX, json.dumps(index, indent=2) + "\n")


def _write_text_files(source: Path, part: Path, values: dict) -> None:
    """Put tokenizer, chat template and generation settings beside the weights."""
    if source.is_file():
        load_tokenizer(str(source)).save_pretrained(part)
    else:
        for name in _TAKEN_OVER:
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
    if not (part / "generation_config.json").exists():
        ids = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {"_from_model_config": True, **{name: value for name, value in ids.items() if value is not None}}
        write_text(part / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
