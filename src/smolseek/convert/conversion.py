"""What is to be made of a source: the options, and which of them go together."""

from dataclasses import dataclass
from typing import Literal

from smolseek.config import ModelConfig
from smolseek.convert import experts as mixture
from smolseek.convert import lossless
from smolseek.convert.components import Method
from smolseek.convert.compress import Budget, Profile
from smolseek.convert.experts import Neurons
from smolseek.convert.sparse import sparse_config
from smolseek.errors import SmolseekError

_COMPRESSING = (
    "cache",
    "kv_rank",
    "rope_dim",
    "profile",
    "method",
    "freq_fold",
    "prune",
    "active",
    "calibration",
    "calibration_tokens",
    "text_column",
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of the source."""

    mode: Literal["exact", "grow", "compress"] = "exact"
    """`exact` computes what the source computes; `grow` does so with new experts beside, to be trained; `compress`
    comes near it with a smaller cache."""
    experts: int | None = None
    """Routed experts: parts of the dense layers (exact, compress) or new ones (grow); None leaves the layers dense."""
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
    profile: Profile = "hf-exact"
    """`portable` is for engines that have one ladder of frequencies and one epsilon, and no `longrope` (compress)."""
    method: Method = "smolseek"
    """`transmla` is the published method, to compare with (compress)."""
    freq_fold: int = 1
    """Adjacent frequencies that are treated as one (compress)."""
    prune: float | None = None
    """Share of the neurons of each feed-forward layer that is kept (compress, with a smaller cache or without)."""
    active: int | None = None
    """Routed experts that a token uses, beside the shared ones (compress, with `experts`)."""
    calibration: str = "builtin"
    """Text that the smaller model is fitted to: `builtin`, files, or `self`, which the source writes (compress)."""
    calibration_tokens: int = 16_384
    """Tokens of it (compress)."""
    text_column: str = "text"
    """Column or key that holds the text of files (compress)."""
    tokenizer: str | None = None
    """Name of another tokenizer than the source's own, for a .gguf file whose tokenizer is not supported."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    seed: int = 0
    """Seed of the clustering, of the new experts and of the text that the source writes."""

    def __post_init__(self) -> None:
        if not -(2**31) <= self.seed < 2**31:  # seeds of layers and rows are made of it
            raise SmolseekError(f"--seed {self.seed:.3e} does not fit 32 bits: use a smaller number")
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
        if self.top_k is not None:
            raise SmolseekError("--top-k belongs to --mode grow: --mode compress has --active A")
        if self.experts is None and (self.shared is not None or self.active is not None):
            raise SmolseekError(
                "--shared and --active need --experts E: for example --experts 48 --shared 80 --active 16"
            )
        if self.experts is not None and self.active is None:
            raise SmolseekError(
                "--mode compress --experts needs --active A, the routed experts that a token uses: with all of them it "
                "is --mode exact"
            )
        if self.experts is not None and self.prune is not None:
            raise SmolseekError("--prune and --experts both leave neurons out: choose one of them")
        if self.neurons != "contiguous":
            raise SmolseekError("--neurons clustered belongs to --mode exact: compress clusters by what neurons write")
        if self.cache is not None and self.kv_rank is not None:
            raise SmolseekError("--cache and --kv-rank say the same: leave one of them out")
        if self.cache is None and self.kv_rank is None:
            if self.prune is None and self.experts is None:
                raise SmolseekError(
                    "--mode compress needs --cache SHARE, --kv-rank R with --rope-dim D, --prune SHARE or --experts E: "
                    "--cache 0.5"
                )
            if (
                self.rope_dim is not None
                or self.profile != "hf-exact"
                or self.method != "smolseek"
                or self.freq_fold != 1
            ):
                raise SmolseekError(
                    "--rope-dim, --profile, --method and --freq-fold need a smaller cache: add --cache SHARE"
                )
        if self.profile == "portable" and self.method == "transmla":
            raise SmolseekError("--profile portable belongs to --method smolseek: leave one of them out")
        if self.kv_rank is not None and self.rope_dim is None:
            raise SmolseekError(f"--kv-rank {self.kv_rank} needs --rope-dim D beside it: for example 48")
        if self.cache is not None and not 0 < self.cache < 1:
            raise SmolseekError(f"--cache {self.cache} is no share between 0 and 1: 0.5 halves the cache")
        if self.prune is not None and not 0 < self.prune < 1:
            raise SmolseekError(f"--prune {self.prune} is no share between 0 and 1: 0.75 keeps three quarters")
        for name in ("kv_rank", "rope_dim", "freq_fold", "calibration_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SmolseekError(f"--{name.replace('_', '-')} {value} is below 1: use a positive number")

    def budget(self, source: ModelConfig) -> Budget | None:
        """Return what the cache may hold, None for the whole one. Raises SmolseekError if it cannot be spent."""
        if self.cache is None and self.kv_rank is None:
            return None
        features = (self.kv_rank or 0) + (self.rope_dim or 0)
        if self.cache is not None:
            features = round(self.cache * source.cache_features)
        budget = Budget(features, self.rope_dim, self.method, self.freq_fold, self.profile)
        budget.check(source)
        return budget

    def config(self, source: ModelConfig) -> ModelConfig:
        """Return the shape with the whole cache, experts included.

        Raises:
            SmolseekError: if the experts do not fit, or a smaller cache cannot be spent.
        """
        self.budget(source)
        config = lossless.target_config(source)
        if self.experts is None:
            return config
        shared = 1 if self.shared is None else self.shared
        if self.mode == "grow":
            return mixture.grow_config(config, self.experts, shared, self.top_k or 0)
        if self.mode == "compress":
            return sparse_config(config, self.experts, shared, self.active or 0)
        return mixture.split_config(config, self.experts, shared)

    def words(self) -> str:
        """Return the mode in a few words."""
        shared = 1 if self.shared is None else self.shared
        if self.mode == "compress":
            what: list[str] = [] if self.cache is None and self.kv_rank is None else [self.method]
            what += ["portable"] if self.profile == "portable" else []
            what += [] if self.prune is None else [f"{self.prune:.0%} of the neurons"]
            if self.experts is not None:
                what.append(f"{shared} shared and {self.active} of {self.experts} routed experts a token")
            text = f"{self.calibration_tokens:,} tokens of {self.calibration}"
            return f"compress, {', '.join(what)}, calibrated on {text}"
        if self.mode == "grow":
            return f"grow, {shared} shared and {self.experts} new routed experts, top-{self.top_k}"
        if self.experts is None:
            return "exact, dense feed-forward layers"
        return f"exact, {shared} shared and {self.experts} routed experts, {self.neurons} neurons, all active"
