"""The options of a conversion, and checks of their combinations. This module does not import torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError

Neurons = Literal["contiguous", "clustered"]
Method = Literal["smolseek", "transmla"]
Profile = Literal["hf-exact", "portable"]

_LEAST_HEAD = 32
"""Smallest head size of a source for other engines, because a compressed head has as many features without RoPE."""
_CACHE_OPTIONS = ("rope_dim", "profile", "method", "freq_fold")
_FITTED = ("cache", "kv_rank", "prune", "active", "calibration", "calibration_tokens", "text_column", *_CACHE_OPTIONS)
_MODE_OF = {"top_k": "grow", "neurons": "exact", **dict.fromkeys(_FITTED, "compress")}
"""Options that are allowed in only one mode, with this mode."""
_NEEDS = (("shared", "experts", 4), ("neurons", "experts", 4), ("active", "experts", 48), ("kv_rank", "rope_dim", 48))
"""Options that require another option, with an example value for the other option."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The options of a conversion."""

    mode: Literal["exact", "grow", "compress"] = "exact"
    """exact computes the same function as the source; grow also adds new experts, which are trained later; compress
    approximates the source with a smaller cache or fewer neurons."""
    experts: int | None = None
    """Number of routed experts: split from dense layers (exact, compress) or new (grow). With None, the layers stay
    dense."""
    shared: int | None = None
    """Number of shared experts (1 by default)."""
    neurons: Neurons = "contiguous"
    """Method by which the neurons are partitioned into experts (exact)."""
    top_k: int | None = None
    """Number of routed experts per token (grow)."""
    cache: float | None = None
    """Size of the cache as a share of the source's cache, for example 0.5 (compress)."""
    kv_rank: int | None = None
    """Number of features of the latent; use it with --rope-dim instead of --cache (compress)."""
    rope_dim: int | None = None
    """Number of rotary features. By default smolseek searches the best number, and transmla keeps the number of
    features of one head (compress)."""
    profile: Profile = "portable"
    """portable is for all engines: a smaller cache with the default RoPE and one epsilon for all norms; hf-exact uses
    longrope, which keeps more at two thirds of the cache, for transformers and smolseek only (compress)."""
    method: Method = "smolseek"
    """How the cache is compressed: transmla is the published method, for comparisons (compress)."""
    freq_fold: int = 1
    """Number of adjacent frequencies that are treated as one, FreqFold in TransMLA (compress)."""
    prune: float | None = None
    """Share of its neurons that each feed-forward layer keeps, for example 0.75 (compress)."""
    active: int | None = None
    """Number of routed experts per token, beside the shared experts (compress, with --experts)."""
    calibration: str = "builtin"
    """Text to which the smaller model is fitted: builtin, a file or folder, or self for text that the source generates
    (compress)."""
    calibration_tokens: int = 16_384
    """Number of tokens of calibration text (compress)."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text (compress)."""
    tokenizer: str | None = None
    """Folder or hub name of the same model, for a .gguf file with a tokenizer that is not supported."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    seed: int = 0
    """Random seed for the clustering, for the new experts and for the text that the source generates."""

    def __post_init__(self) -> None:
        if not -(2**31) <= self.seed < 2**31:  # other seeds are computed from it
            raise SmolseekError(f"--seed {str(self.seed)[:40]} does not fit 32 bits: use a smaller number")
        changed = self._changed()
        for name in changed:
            if _MODE_OF.get(name, self.mode) != self.mode:
                raise SmolseekError(
                    f"{_option(name)} needs --mode {_MODE_OF[name]}: add --mode {_MODE_OF[name]}, or leave out "
                    f"{_option(name)}"
                )
        for name, other, example in _NEEDS:
            if name in changed and other not in changed:
                raise SmolseekError(f"{_option(name)} needs {_option(other)}: for example {_option(other)} {example}")
        if self.mode == "grow" and not {"experts", "top_k"} <= changed.keys():
            raise SmolseekError("--mode grow needs --experts E and --top-k K: for example --experts 4 --top-k 2")
        if self.mode == "compress":
            self._check_compression()

    def _check_compression(self) -> None:
        if self.experts is not None and self.active is None:
            raise SmolseekError(
                "--mode compress with --experts needs the number of active routed experts per token: add "
                "--active A, or "
                "use --mode exact, in which all experts are active"
            )
        if self.experts is not None and self.prune is not None:
            raise SmolseekError(
                "--prune and --experts cannot be combined, because both leave neurons out: choose one of them"
            )
        if self.cache is not None and self.kv_rank is not None:
            raise SmolseekError("--cache and --kv-rank both set the size of the cache: leave out one of them")
        if not self.smaller_cache:
            if self.prune is None and self.experts is None:
                ways = (
                    "--cache SHARE, --kv-rank R with --rope-dim D, --prune SHARE or --experts E: for "
                    "example --cache 0.5"
                )
                raise SmolseekError(f"--mode compress needs {ways}")
            for name in _CACHE_OPTIONS:
                if name in self._changed():
                    raise SmolseekError(f"{_option(name)} works only with a smaller cache: add --cache SHARE")
        if self.profile == "portable" and self.method == "transmla":
            raise SmolseekError("--method transmla has no portable profile: add --profile hf-exact")
        for name, example in (("cache", "use 0.5 to halve the cache"), ("prune", "use 0.75 to keep three quarters")):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise SmolseekError(f"--{name} {share} is not a share between 0 and 1: {example}")
        for name in ("kv_rank", "rope_dim", "freq_fold", "calibration_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SmolseekError(f"{_option(name)} {value} is below 1: use a positive number")

    def check_cache(self, source: ModelConfig) -> None:
        """Raise SmolseekError if the smaller cache is impossible for the Llama `source`."""
        features, rope = self.cache_features(source), self.rotary_features(source)
        before, size = source.cache_features, source.qk_head_dim
        if features >= before:
            raise SmolseekError(
                f"a cache of {features} features is not smaller than the source's {before}: use a smaller cache"
            )
        if features < 16:
            raise SmolseekError(f"a cache of {features} features is too small: keep at least 16 of {before} features")
        most = min(before // 2, features - 8)
        if rope is not None and (rope % 2 or not 2 <= rope <= most):
            raise SmolseekError(
                f"--rope-dim {rope} does not fit a cache of {features} features: use an even number from 2 to {most}"
            )
        if (size // 2) % self.freq_fold:
            frequencies = f"the {size // 2} frequencies of a head"
            raise SmolseekError(
                f"--freq-fold {self.freq_fold} does not divide {frequencies}: use a divisor of {size // 2}"
            )
        ladder = size // self.freq_fold
        if self.method == "transmla" and (rope or 0) % ladder:
            raise SmolseekError(f"--rope-dim {rope} does not fit --method transmla: use a multiple of {ladder}")
        if self.profile == "portable" and size < _LEAST_HEAD:
            needed = f"heads of at least {_LEAST_HEAD} features, but the source's heads have {size}"
            raise SmolseekError(f"--profile portable, the default, needs {needed}: add --profile hf-exact")

    @property
    def smaller_cache(self) -> bool:
        """Whether the cache gets smaller."""
        return self.cache is not None or self.kv_rank is not None

    @property
    def portable(self) -> bool:
        """Whether the result has the portable profile. A model with a cache of full size needs longrope."""
        return self.smaller_cache and self.profile == "portable"

    @property
    def shared_experts(self) -> int:
        """Number of shared experts beside the routed experts."""
        return 1 if self.shared is None else self.shared

    def cache_features(self, source: ModelConfig) -> int:
        """Return the number of features that are cached per token and layer, in the latent and in the rotary key."""
        if self.cache is not None:
            return round(self.cache * source.cache_features)
        return (self.kv_rank or 0) + (self.rope_dim or 0)

    def rotary_features(self, source: ModelConfig) -> int | None:
        """Return the number of rotary features, or None if the best number is searched."""
        return source.qk_head_dim if self.rope_dim is None and self.method == "transmla" else self.rope_dim

    def description(self) -> str:
        """Return a short description of the conversion."""
        if self.mode == "grow":
            return f"grow, {self.shared_experts} shared and {self.experts} new routed experts, top-{self.top_k}"
        if self.mode == "exact":
            experts = f"{self.shared_experts} shared and {self.experts} routed experts, {self.neurons} neurons"
            return "exact, dense feed-forward layers" if self.experts is None else f"exact, {experts}, all active"
        steps: list[str] = [self.method] if self.smaller_cache else []
        steps += [self.profile] if self.smaller_cache else []
        steps += [] if self.prune is None else [f"{self.prune:.0%} of the neurons"]
        if self.experts is not None:
            steps.append(f"{self.shared_experts} shared and {self.active} of {self.experts} routed experts a token")
        steps.append(f"calibrated on {self.calibration_tokens:,} tokens of {self.calibration}")
        return ", ".join(("compress", *steps))

    def _changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(Conversion))
        return {field.name: value for field, value in values if value != field.default}

    def arguments(self) -> list[str]:
        """Return the options that differ from their defaults, as command-line arguments."""
        return [word for name, value in self._changed().items() for word in (_option(name), str(value))]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
