"""The shape of a model. This module does not import torch.

The fields of `ModelConfig` have the names of Hugging Face's `DeepseekV3Config`, so that a checkpoint's `config.json`
needs no mapping. The few fields that DeepSeek-V3 does not have get their names from `LlamaConfig`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from smolseek.config.option import check_numbers, option
from smolseek.errors import SmolseekError

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Parameters of the rotary embedding, named as in Hugging Face's `rope_parameters`. Unused parameters stay None."""

    rope_type: RopeType = "default"
    """How the frequencies are derived from `rope_theta`."""
    rope_theta: float = 10_000.0
    """Base theta of the frequencies theta^(-2i/d)."""
    factor: float | None = option(None, above=0)
    """Context extension factor (linear, llama3, yarn, longrope)."""
    original_max_position_embeddings: int | None = option(None, above=0)
    """Context length before the extension (llama3, yarn, longrope)."""
    attention_factor: float | None = option(None, above=0)
    """Factor on cos and sin (yarn, longrope); None derives it from `factor`."""
    beta_fast: float | None = option(None, above=0)
    """yarn: number of rotations within the original context above which a frequency is unchanged."""
    beta_slow: float | None = option(None, above=0)
    """yarn: number of rotations within the original context below which a frequency is divided by `factor`."""
    mscale: float | None = None
    """yarn: numerator of the attention factor."""
    mscale_all_dim: float | None = None
    """yarn: denominator of the attention factor; its square also scales the softmax."""
    truncate: bool | None = None
    """yarn: whether the bounds of the ramp are rounded to whole dimensions; None means True."""
    low_freq_factor: float | None = option(None, above=0)
    """llama3: wavelengths above original/low_freq_factor are divided by `factor`."""
    high_freq_factor: float | None = option(None, above=0)
    """llama3: wavelengths below original/high_freq_factor are unchanged."""
    short_factor: tuple[float, ...] | None = option(None, above=0)
    """longrope: one divisor per frequency, up to the original context."""
    long_factor: tuple[float, ...] | None = option(None, above=0)
    """longrope: one divisor per frequency, beyond the original context."""

    def __post_init__(self) -> None:
        check_numbers(self, remedy=": take the value of the model's authors, or use rope_type 'default'")
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("factor", "original_max_position_embeddings"),
            "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
        }
        if self.rope_type not in needed:
            raise SmolseekError(f"rope_type {self.rope_type!r} is not supported: use one of {', '.join(needed)}")
        missing = [name for name in needed[self.rope_type] if getattr(self, name) is None]
        if missing:
            raise SmolseekError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}: set them, or use 'default'")
        if self.low_freq_factor is not None and self.low_freq_factor == self.high_freq_factor:
            raise SmolseekError(
                f"low_freq_factor and high_freq_factor are both {self.low_freq_factor}: raise high_freq_factor"
            )
        # With longrope the base may be 1, since its factors alone can define all frequencies.
        if self.rope_theta < 1 or (self.rope_theta == 1 and self.rope_type != "longrope"):
            raise SmolseekError(f"rope_theta {self.rope_theta} must be above 1: use for example 10000")


ModelType = Literal["deepseek_v3", "llama", "smolseek_gqa_moe"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only language model. Sizes are in features, tokens or layers.

    Attention is MLA if `kv_lora_rank` is set, and grouped-query attention otherwise. If `n_routed_experts` is above 0,
    the layers from `first_k_dense_replace` on have a mixture of experts.
    """

    model_type: ModelType = "deepseek_v3"
    """Hugging Face's name of the architecture; only smolseek opens `smolseek_gqa_moe` (GQA with experts)."""
    vocab_size: int = option(49_152, least=1)
    """Number of tokens in the vocabulary."""
    hidden_size: int = option(512, least=1)
    """Width of the residual stream."""
    num_hidden_layers: int = option(12, least=1)
    """Number of blocks."""
    intermediate_size: int = 1536
    """Number of neurons in a dense feed-forward layer."""
    num_attention_heads: int = option(8, least=1)
    """Number of query heads."""
    num_key_value_heads: int = option(8, least=1)
    """Number of key and value heads (GQA); for MLA equal to the number of query heads."""
    head_dim: int | None = option(None, least=1)
    """Size of a head (GQA); None is hidden_size / num_attention_heads. For MLA, the four sizes of heads and latents are
    used instead."""
    q_lora_rank: int | None = option(None, least=1)
    """Rank of the compressed query; None for a full query projection."""
    kv_lora_rank: int | None = option(None, least=1)
    """Rank of the compressed keys and values, the latent that is cached (MLA); None for GQA."""
    qk_nope_head_dim: int = option(0, least=0)
    """Features of a query or key head without RoPE (MLA)."""
    qk_rope_head_dim: int = option(0, least=0)
    """Features of a query or key head with RoPE (MLA); all heads share these features of the key."""
    v_head_dim: int = 0
    """Features of a value head (MLA)."""
    latent_norm: bool = True
    """Normalise the latent (MLA). False for models converted from Llamas, whose files have a norm without effect."""
    latent_norm_eps: float = option(1e-6, least=0)
    """Epsilon of the RMS norms of the latents (MLA). transformers always uses 1e-6; a GGUF file has one epsilon for all
    norms."""
    attention_bias: bool = False
    """Biases on q_a_proj, kv_a_proj_with_mqa and o_proj, as in DeepSeek-V3."""
    n_routed_experts: int = option(0, least=0)
    """Number of routed experts in a layer; 0 makes all layers dense."""
    n_shared_experts: int = option(0, least=0)
    """Number of shared experts, which process every token."""
    num_experts_per_tok: int = 0
    """Number of routed experts that each token uses (top-k)."""
    moe_intermediate_size: int = 0
    """Number of neurons in one expert."""
    first_k_dense_replace: int = option(0, least=0)
    """Number of first layers that stay dense."""
    n_group: int = option(1, least=1)
    """Number of groups that the routed experts are divided into."""
    topk_group: int = 1
    """Number of groups from which a token's experts are chosen."""
    norm_topk_prob: bool = True
    """Renormalise the gate weights of the chosen experts so that their sum is 1."""
    routed_scaling_factor: float = 1.0
    """Factor on the sum of the routed experts' results."""
    hidden_act: Literal["silu"] = "silu"
    """Activation of the feed-forward layers."""
    mlp_gated: bool = True
    """Use SwiGLU experts; False uses the two-matrix experts of the seed experiment."""
    mlp_bias: bool = False
    """Biases in the two-matrix experts."""
    tie_word_embeddings: bool = False
    """Share the embedding with the output head."""
    max_position_embeddings: int = option(2048, least=2)
    """Context length, in tokens."""
    rope_parameters: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding."""
    rope_interleave: bool = True
    """RoPE rotates pairs of neighbouring features (MLA); False pairs the first half with the second."""
    rms_norm_eps: float = option(1e-6, least=0)
    """Epsilon of the RMS norms on the residual stream."""
    initializer_range: float = option(0.006, least=0)
    """Standard deviation of the initial weights (0.006 in DeepSeek-V3, section 4.2)."""
    bos_token_id: int | None = 0
    """Id of the token that begins a text."""
    eos_token_id: int | tuple[int, ...] | None = 0
    """Id or ids of the tokens that end a text; the first id separates documents in training."""
    pad_token_id: int | None = None
    """Id of the padding token for other tools; smolseek never pads."""

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Number of features of a query head."""
        if self.is_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Number of features of a head that RoPE rotates."""
        return self.qk_rope_head_dim if self.is_mla else self.qk_head_dim

    @property
    def cache_features(self) -> int:
        """Number of cached features per token and layer: r + d_r for MLA, keys and values for GQA."""
        if self.is_mla:
            assert self.kv_lora_rank is not None
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.qk_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (counted from 0) has a mixture of experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @property
    def n_moe_layers(self) -> int:
        """Number of blocks with a mixture of experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of all end tokens."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def __post_init__(self) -> None:
        check_numbers(self)
        for problem in itertools.chain(_wrong_limits(self), _wrong_attention(self), _wrong_layers(self)):
            raise SmolseekError(problem)


# Each function yields error messages. Only the first message is raised, so later checks may rely on earlier ones.


def _wrong_limits(c: ModelConfig) -> Iterator[str]:
    for f in fields(c):
        value, limit = getattr(c, f.name), 10_000 if f.name == "num_hidden_layers" else 2**31
        if isinstance(value, int) and value > limit:
            yield f"{f.name} {value:,} is above {limit:,}: use a smaller number"
    width, experts = c.qk_head_dim * c.num_attention_heads, 2 * c.n_routed_experts * c.moe_intermediate_size
    largest = c.hidden_size * max(c.vocab_size, c.intermediate_size, width, experts)
    if largest > 10**11:
        yield f"a matrix of the model would have {largest:,} numbers, too many for any machine: use smaller sizes"
    if any(not 0 <= end < c.vocab_size for end in c.eos_ids):
        yield f"eos_token_id {c.eos_token_id} is not a token id below vocab_size {c.vocab_size}: use the id of a token"


def _wrong_attention(c: ModelConfig) -> Iterator[str]:
    heads = f"num_attention_heads {c.num_attention_heads}"
    if c.num_attention_heads % c.num_key_value_heads:
        yield (
            f"{heads} is not a multiple of num_key_value_heads {c.num_key_value_heads}: each key head must serve the "
            "same number of query heads"
        )
    if c.is_mla and (c.v_head_dim < 1 or c.qk_head_dim < 1):
        yield (
            f"v_head_dim {c.v_head_dim}, qk_nope_head_dim {c.qk_nope_head_dim}, qk_rope_head_dim "
            f"{c.qk_rope_head_dim} must give positive head sizes: use a v_head_dim and a query size above 0"
        )
    if not c.is_mla and c.head_dim is None and c.hidden_size % c.num_attention_heads:
        yield f"hidden_size {c.hidden_size} is not a multiple of {heads}: change one of them, or set head_dim"
    if c.rope_dim % 2:
        yield f"the rotary dimension {c.rope_dim} is odd: RoPE rotates pairs of features, so use an even size"
    for name in ("short_factor", "long_factor"):
        factors = getattr(c.rope_parameters, name)
        if factors is not None and len(factors) != c.rope_dim // 2:
            yield f"{name} has {len(factors)} factors for {c.rope_dim // 2} frequencies: give one for each frequency"


def _wrong_layers(c: ModelConfig) -> Iterator[str]:
    if c.n_moe_layers < c.num_hidden_layers and c.intermediate_size < 1:
        yield f"intermediate_size {c.intermediate_size} is below 1: a dense layer needs at least one neuron"
    ours = "or use model_type smolseek_gqa_moe, which only smolseek opens"
    if c.model_type == "deepseek_v3" and (not c.is_mla or not c.mlp_gated):
        yield (
            f"model_type deepseek_v3 does not allow kv_lora_rank {c.kv_lora_rank} with mlp_gated {c.mlp_gated}: set a "
            f"kv_lora_rank above 0 and mlp_gated True, {ours}"
        )
    if c.model_type == "llama" and (c.is_mla or c.n_moe_layers or c.attention_bias):
        yield (
            f"model_type llama does not allow MLA, experts or attention biases (kv_lora_rank {c.kv_lora_rank}, "
            f"n_routed_experts {c.n_routed_experts}, attention_bias {c.attention_bias}): leave them out, {ours}"
        )
    if c.mlp_bias and c.mlp_gated:
        yield (
            "mlp_bias True needs mlp_gated False, because only experts with two matrices have biases: set "
            "mlp_gated False"
        )
    if not c.mlp_gated and c.n_shared_experts:
        yield f"n_shared_experts {c.n_shared_experts} needs mlp_gated True, because shared experts are gated: use 0"
    if c.n_moe_layers == 0:
        return
    if c.moe_intermediate_size < 1:
        yield f"moe_intermediate_size {c.moe_intermediate_size} is below 1: an expert needs at least one neuron"
    per_group, experts = c.n_routed_experts // c.n_group, f"n_routed_experts {c.n_routed_experts}"
    if c.n_routed_experts % c.n_group:
        yield f"{experts} is not a multiple of n_group {c.n_group}: all groups must have the same size"
    if per_group < 2:
        yield (
            f"{experts} in n_group {c.n_group} gives {per_group} expert per group: use at least 2 experts per group, "
            "because a group's score is the sum of its two best experts"
        )
    if not 1 <= c.topk_group <= c.n_group:
        yield f"topk_group {c.topk_group} is not between 1 and n_group {c.n_group}: lower topk_group"
    if not 1 <= c.num_experts_per_tok <= per_group * c.topk_group:
        yield (
            f"num_experts_per_tok {c.num_experts_per_tok} is not between 1 and the {per_group * c.topk_group} "
            f"selectable experts ({c.n_routed_experts} in {c.n_group} groups, {c.topk_group} of them chosen): lower "
            "num_experts_per_tok or raise topk_group"
        )
