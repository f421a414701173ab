"""Counts the parameters, the cache size and the FLOPs of a configuration, on the meta device."""

import itertools
from dataclasses import dataclass

import torch

from smolseek.config import ModelConfig
from smolseek.model.transformer import CausalLM


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters of a model and its parts."""

    embedding: int
    layers: tuple[int, ...]
    """Parameters of each layer, including router biases."""
    norm: int
    """Parameters of the last norm."""
    lm_head: int
    """Parameters of the head; 0 if it is tied to the embedding."""
    active: int
    """Parameters that one token uses, without unchosen experts and without the embedding. A tied embedding counts as
    the head."""
    balancing: int
    """Number of router biases, which are also counted in `layers`."""

    @property
    def total(self) -> int:
        """Number of all parameters, including router biases."""
        return self.embedding + sum(self.layers) + self.norm + self.lm_head


def count(config: ModelConfig) -> Counts:
    """Count the parameters of `config` without allocating memory for them."""
    with torch.device("meta"):
        model = CausalLM(config)
    layers, idle = [], 0
    for block in model.model.layers:
        size = sum(parameter.numel() for parameter in block.parameters())
        experts = sum(p.numel() for name, p in block.named_parameters() if ".experts." in name)
        if experts:
            idle += experts - experts * config.num_experts_per_tok // config.n_routed_experts
            size += config.n_routed_experts
        layers.append(size)
    embedding, norm = model.model.embed_tokens.weight.numel(), model.model.norm.weight.numel()
    return Counts(
        embedding=embedding,
        layers=tuple(layers),
        norm=norm,
        lm_head=0 if config.tie_word_embeddings else embedding,
        active=embedding + sum(layers) - idle + norm,
        balancing=config.n_moe_layers * config.n_routed_experts,
    )


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Return the FLOPs of a forward pass per token, averaged over a sequence of `context` tokens.

    Each active weight in a matrix multiplication counts as 2 FLOPs. The head is a matrix multiplication, and the
    embedding is a look-up. In causal attention, each query-key pair of tokens costs 2 FLOPs for each feature of a query
    and of a value, and a token has (context + 1) / 2 pairs on average. A training step costs three times as many FLOPs
    as a forward pass.
    """
    counts = count(config)
    products = counts.active - counts.balancing - counts.norm
    value = config.v_head_dim if config.is_mla else config.qk_head_dim
    pair = 2 * config.num_attention_heads * (config.qk_head_dim + value)
    return 2 * products + round(config.num_hidden_layers * pair * (context + 1) / 2)


def cache_bytes(config: ModelConfig, bytes_per_number: int = 2) -> dict[str, int]:
    """Return the cached bytes per token of this model, and of MHA and GQA models with the same heads.

    For a model with MLA, the GQA model has a quarter as many key-value heads as query heads (8/2 in the seed
    experiment). For other models, GQA has the model's own key-value heads.
    """
    heads = config.num_attention_heads
    size = config.v_head_dim if config.is_mla else config.qk_head_dim
    groups = max(1, heads // 4) if config.is_mla else config.num_key_value_heads
    sizes = {"MHA": 2 * heads * size, f"GQA {heads}/{groups}": 2 * groups * size}
    if config.is_mla:
        sizes["MLA"] = config.cache_features
    return {name: config.num_hidden_layers * features * bytes_per_number for name, features in sizes.items()}


def size_text(n: float) -> str:
    """Return a number of bytes as text with its unit."""
    unit = 0
    while n >= 1000 and unit < 4:
        n, unit = n / 1000, unit + 1
    return f"{n:.{min(unit, 1)}f} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def architecture(config: ModelConfig) -> list[str]:
    """Describe the architecture in a few lines."""
    c, rope = config, config.rope_parameters
    lines = [f"Hidden {c.hidden_size}, {c.num_hidden_layers} layers, vocabulary {c.vocab_size:,}"]
    if c.is_mla:
        lines.append(
            f"MLA: {c.num_attention_heads} heads, latent {c.kv_lora_rank} + rotary key {c.qk_rope_head_dim}, "
            f"head {c.qk_nope_head_dim} + {c.qk_rope_head_dim}, value {c.v_head_dim}, "
            + (f"query rank {c.q_lora_rank}" if c.q_lora_rank else "full query")
        )
    else:
        heads = f"{c.num_attention_heads} query heads, {c.num_key_value_heads} key-value heads"
        lines.append(f"GQA: {heads}, head {c.qk_head_dim}")
    if c.n_moe_layers:
        kind = "SwiGLU" if c.mlp_gated else "two-matrix" + (", biased" if c.mlp_bias else "")
        groups = f" in {c.n_group} groups ({c.topk_group} used)" if c.n_group > 1 else ""
        lines.append(
            f"Mixture of experts in {c.n_moe_layers} layers: {c.n_routed_experts} routed{groups}, "
            f"top-{c.num_experts_per_tok}, {c.n_shared_experts} shared, {c.moe_intermediate_size} "
            f"neurons each ({kind}), loss-free balancing"
        )
    if dense := c.num_hidden_layers - c.n_moe_layers:
        lines.append(f"Dense SwiGLU of {c.intermediate_size} neurons in {dense} layers")
    tied = "tied to" if c.tie_word_embeddings else "apart from"
    lines.append(f"Head {tied} the embedding; RoPE {rope.rope_type}, theta {rope.rope_theta:g}")
    lines.append(f"Context {c.max_position_embeddings:,} tokens")
    return lines


def parameter_lines(config: ModelConfig) -> list[str]:
    """Return one line of text with the number of parameters for each part of the model."""
    counts = count(config)
    balancing = f" ({counts.balancing:,} of them balancing biases)" if counts.balancing else ""
    lines = [f"Total parameters: {counts.total:,}{balancing}", f"Active per token: {counts.active:,}"]
    lines.append(f"  embedding: {counts.embedding:,}")
    first = 0
    for size, group in itertools.groupby(counts.layers):
        last = first + len(list(group)) - 1
        lines.append(f"  {f'block {first}' if first == last else f'blocks {first}-{last}, each'}: {size:,}")
        first = last + 1
    tied = " (tied)" if config.tie_word_embeddings else ""
    return [*lines, f"  norm: {counts.norm:,}", f"  lm_head: {counts.lm_head:,}{tied}"]


def summarize(config: ModelConfig, seq_len: int = 256) -> str:
    """Return the summary of `config` that `smolseek inspect` prints."""
    seq_len = min(seq_len, config.max_position_embeddings)
    cached = ", ".join(f"{name} {size_text(size)}" for name, size in cache_bytes(config).items())
    forward = flops_per_token(config, seq_len)
    lines = [*parameter_lines(config), "Architecture:", *(f"  {line}" for line in architecture(config))]
    lines.append(f"Cache per token in bf16: {cached}")
    arithmetic = f"{forward / 1e6:,.1f} MFLOP forward, {3 * forward / 1e6:,.1f} MFLOP in training"
    return "\n".join([*lines, f"Arithmetic per token at {seq_len} tokens: {arithmetic}"])
