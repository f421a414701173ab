"""The options of a conversion, and which of them go together. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError

Neurons = Literal["contiguous", "clustered"]
Method = Literal["smolseek", "transmla"]
Profile = Literal["hf-exact", "portable"]

_LEAST_HEAD = 32
"""Features without position that other engines need in a head; a compressed head has as many as the source's heads."""
_CACHE_OPTIONS = ("rope_dim", "profile", "method", "freq_fold")
_FITTED = ("cache", "kv_rank", "prune", "active", "calibration", "calibration_tokens", "text_column", *_CACHE_OPTIONS)
_MODE_OF = {"top_k": "grow", "neurons": "exact", **dict.fromkeys(_FITTED, "compress")}
"""Options that belong to one mode."""
_NEEDS = (("shared", "experts", 4), ("neurons", "experts", 4), ("active", "experts", 48), ("kv_rank", "rope_dim", 48))
"""Options that need another one beside them, with an example of that."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is made of the source."""

    mode: Literal["exact", "grow", "compress"] = "exact"
    """exact computes the same function as the source; grow does so, too, and adds new experts to be trained; compress
    approximates it with a smaller cache or fewer neurons."""
    experts: int | None = None
    """Routed experts: split from the dense layers (exact, compress) or new (grow). None leaves the layers dense."""
    shared: int | None = None
    """Shared experts (1 by default)."""
    neurons: Neurons = "contiguous"
    """How the neurons are partitioned into experts (exact)."""
    top_k: int | None = None
    """Routed experts that a token visits (grow)."""
    cache: float | None = None
    """Share of the source's cache that is kept, for example 0.5 (compress)."""
    kv_rank: int | None = None
    """Features of the latent; with --rope-dim, instead of --cache (compress)."""
    rope_dim: int | None = None
    """Rotary features; by default they are searched, and one head's for the published method (compress)."""
    profile: Profile = "hf-exact"
    """portable does without longrope, for engines with the default RoPE and one epsilon for all norms (compress)."""
    method: Method = "smolseek"
    """transmla is the published method, to compare with (compress)."""
    freq_fold: int = 1
    """Adjacent frequencies treated as one: FreqFold of the published method (compress)."""
    prune: float | None = None
    """Share of the neurons of each feed-forward layer that is kept, for example 0.75 (compress)."""
    active: int | None = None
    """Routed experts that a token uses, beside the shared ones (compress, with --experts)."""
    calibration: str = "builtin"
    """Text that the smaller model is fitted to: builtin, a file or folder, or self for text that the source writes
    (compress)."""
    calibration_tokens: int = 16_384
    """Tokens of calibration text (compress)."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text (compress)."""
    tokenizer: str | None = None
    """Another tokenizer than the source's own, for a .gguf file whose tokenizer is not supported: a folder or hub name
    of the same model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    seed: int = 0
    """Seed of the clustering, of the new experts and of the text that the source writes."""

    def __post_init__(self) -> None:
        if not -(2**31) <= self.seed < 2**31:  # seeds of layers and sequences are computed from it
            raise SmolseekError(f"--seed {str(self.seed)[:40]} does not fit 32 bits: use a smaller number")
        changed = self._changed()
        for name in changed:
            if _MODE_OF.get(name, self.mode) != self.mode:
                raise SmolseekError(f"{_option(name)} belongs to --mode {_MODE_OF[name]}: add that, or leave it out")
        for name, other, example in _NEEDS:
            if name in changed and other not in changed:
                raise SmolseekError(f"{_option(name)} needs {_option(other)}: for example {_option(other)} {example}")
        if self.mode == "grow" and not {"experts", "top_k"} <= changed.keys():
            raise SmolseekError("--mode grow needs --experts E and --top-k K: for example --experts 4 --top-k 2")
        if self.mode == "compress":
            self._check_compression()

    def _check_compression(self) -> None:
        if self.experts is not None and self.active is None:
            why = "the routed experts that a token uses: with all of them it is --mode exact"
            raise SmolseekError(f"--mode compress --experts needs --active A, {why}")
        if self.experts is not None and self.prune is not None:
            raise SmolseekError("--prune and --experts both leave neurons out: choose one of them")
        if self.cache is not None and self.kv_rank is not None:
            raise SmolseekError("--cache and --kv-rank say the same: leave one of them out")
        if not self.smaller_cache:
            if self.prune is None and self.experts is None:
                ways = "--cache SHARE, --kv-rank R with --rope-dim D, --prune SHARE or --experts E: --cache 0.5"
                raise SmolseekError(f"--mode compress needs {ways}")
            for name in _CACHE_OPTIONS:
                if name in self._changed():
                    raise SmolseekError(f"{_option(name)} needs a smaller cache: add --cache SHARE")
        if self.profile == "portable" and self.method == "transmla":
            raise SmolseekError("--profile portable belongs to --method smolseek: leave one of them out")
        for name, example in (("cache", "0.5 halves the cache"), ("prune", "0.75 keeps three quarters")):
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
            raise SmolseekError(f"{features} features of cache are no fewer than the source's {before}: use fewer")
        if features < 16:
            raise SmolseekError(f"{features} features of cache are too few: keep at least 16 of {before}")
        most = min(before // 2, features - 8)
        if rope is not None and (rope % 2 or not 2 <= rope <= most):
            raise SmolseekError(f"--rope-dim {rope} does not fit {features} features: 2 to {most}, even")
        if (size // 2) % self.freq_fold:
            raise SmolseekError(f"--freq-fold {self.freq_fold} does not divide the {size // 2} frequencies of a head")
        ladder = size // self.freq_fold
        if self.method == "transmla" and (rope or 0) % ladder:
            raise SmolseekError(f"transmla keeps whole ladders: --rope-dim must be a multiple of {ladder}")
        if self.profile == "portable" and size < _LEAST_HEAD:
            needed = f"heads of {_LEAST_HEAD} features or more, and the source's have {size}"
            raise SmolseekError(f"--profile portable needs {needed}: leave it out")

    @property
    def smaller_cache(self) -> bool:
        """Whether the cache gets smaller."""
        return self.cache is not None or self.kv_rank is not None

    @property
    def shared_experts(self) -> int:
        """Shared experts beside the routed ones."""
        return 1 if self.shared is None else self.shared

    def cache_features(self, source: ModelConfig) -> int:
        """Return the features that are cached per token and layer: the latent's and the rotary ones."""
        if self.cache is not None:
            return round(self.cache * source.cache_features)
        return (self.kv_rank or 0) + (self.rope_dim or 0)

    def rotary_features(self, source: ModelConfig) -> int | None:
        """Return the number of rotary features, None if it is searched; the published method keeps one head's."""
        return source.qk_head_dim if self.rope_dim is None and self.method == "transmla" else self.rope_dim

    def description(self) -> str:
        """Return the mode in a few words."""
        if self.mode == "grow":
            return f"grow, {self.shared_experts} shared and {self.experts} new routed experts, top-{self.top_k}"
        if self.mode == "exact":
            experts = f"{self.shared_experts} shared and {self.experts} routed experts, {self.neurons} neurons"
            return "exact, dense feed-forward layers" if self.experts is None else f"exact, {experts}, all active"
        steps: list[str] = [self.method] if self.smaller_cache else []
        steps += ["portable"] if self.profile == "portable" else []
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
        """Return the options that differ from their defaults, as on the command line."""
        return [word for name, value in self._changed().items() for word in (_option(name), str(value))]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
