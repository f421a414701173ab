"""What a configuration amounts to: parameters, cache and arithmetic, counted on the meta device."""

from dataclasses import dataclass

import torch

from smolseek.config import ModelConfig
from smolseek.model.transformer import CausalLM


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model; the balancing biases are counted with their blocks."""

    embedding: int
    """Token embedding."""
    blocks: tuple[int, ...]
    """Each block."""
    norm: int
    """The last norm."""
    lm_head: int
    """Output head; 0 when tied to the embedding."""
    active: int
    """Parameters that one token uses: all but the routed experts it does not visit, and an embedding that is not
    also the head (a look-up of one row)."""
    balancing: int
    """Balancing biases, part of the blocks."""

    @property
    def total(self) -> int:
        """All parameters, balancing biases included."""
        return self.embedding + sum(self.blocks) + self.norm + self.lm_head


def count(config: ModelConfig) -> Counts:
    """Count the parameters of `config` without making them."""
    with torch.device("meta"):
        model = CausalLM(config)
    blocks = []
    idle = 0
    for block in model.model.layers:
        size = sum(parameter.numel() for parameter in block.parameters())
        experts = sum(p.numel() for name, p in block.named_parameters() if ".experts." in name)
        if config.n_routed_experts and experts:
            idle += experts - experts * config.num_experts_per_tok // config.n_routed_experts
            size += config.n_routed_experts
        blocks.append(size)
    embedding = model.model.embed_tokens.weight.numel()
    lm_head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    norm = model.model.norm.weight.numel()
    total = embedding + sum(blocks) + norm + lm_head
    looked_up = 0 if config.tie_word_embeddings else embedding
    return Counts(
        embedding=embedding,
        blocks=tuple(blocks),
        norm=norm,
        lm_head=lm_head,
        active=total - idle - looked_up,
        balancing=config.n_moe_layers * config.n_routed_experts,
    )


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Return the floating point operations of a forward pass per token, averaged over a sequence of `context` tokens.

    Two for each active weight in a product (the embedding is a look-up, the head a product), and for causal
    attention two for each feature of a query and value per pair of tokens, (context + 1) / 2 pairs on average.
    A training step costs three times this.
    """
    counts = count(config)
    products = counts.active - counts.balancing - counts.norm
    value = config.v_head_dim if config.is_mla else config.qk_head_dim
    pair = 2 * config.num_attention_heads * (config.qk_head_dim + value)
    return 2 * products + round(config.num_hidden_layers * pair * (context + 1) / 2)


def cache_bytes(config: ModelConfig, bytes_per_number: int = 2) -> dict[str, int]:
    """Return the bytes cached per token: as this model does it, and as MHA and GQA of its heads would.

    The GQA column is a quarter of the heads (as in the seed experiment, 8/2) for an MLA model and the model's own
    key-value heads otherwise.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    size = config.v_head_dim if config.is_mla else config.qk_head_dim
    groups = max(1, heads // 4) if config.is_mla else config.num_key_value_heads
    sizes = {"MHA": 2 * heads * size, f"GQA {heads}/{groups}": 2 * groups * size}
    if config.is_mla:
        sizes["MLA"] = config.cache_features
    return {name: layers * features * bytes_per_number for name, features in sizes.items()}


def size_text(n: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def architecture(config: ModelConfig) -> list[str]:
    """Return the architecture in a few lines of words."""
    if config.is_mla:
        query = f"query rank {config.q_lora_rank}" if config.q_lora_rank else "full query"
        attention = (
            f"MLA: {config.num_attention_heads} heads, latent {config.kv_lora_rank} + rotary key "
            f"{config.qk_rope_head_dim}, head {config.qk_nope_head_dim} + {config.qk_rope_head_dim}, "
            f"value {config.v_head_dim}, {query}"
        )
    else:
        attention = (
            f"GQA: {config.num_attention_heads} query heads, {config.num_key_value_heads} key-value heads, "
            f"head {config.qk_head_dim}"
        )
    lines = [f"Hidden {config.hidden_size}, {config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}"]
    lines.append(attention)
    if config.n_moe_layers:
        kind = "SwiGLU" if config.mlp_gated else "two-matrix" + (", biased" if config.mlp_bias else "")
        groups = f" in {config.n_group} groups ({config.topk_group} used)" if config.n_group > 1 else ""
        lines.append(
            f"Mixture of experts in {config.n_moe_layers} layers: {config.n_routed_experts} routed{groups}, "
            f"top-{config.num_experts_per_tok}, {config.n_shared_experts} shared, {config.moe_intermediate_size} "
            f"neurons each ({kind}), loss-free balancing"
        )
    if config.n_moe_layers < config.num_hidden_layers:
        dense = config.num_hidden_layers - config.n_moe_layers
        lines.append(f"Dense SwiGLU of {config.intermediate_size} neurons in {dense} layers")
    tied = "tied to" if config.tie_word_embeddings else "apart from"
    rope = config.rope_parameters
    lines.append(f"Head {tied} the embedding; RoPE {rope.rope_type}, theta {rope.rope_theta:g}")
    lines.append(f"Context {config.max_position_embeddings:,} tokens")
    return lines


def parameter_lines(config: ModelConfig) -> list[str]:
    """Return the parameters by part, one line each, as the original's summary prints them."""
    counts = count(config)
    lines = [f"Total parameters: {counts.total:,}"]
    if counts.balancing:
        lines[0] += f" ({counts.balancing:,} of them balancing biases)"
    lines.append(f"Active per token: {counts.active:,}")
    lines.append(f"  embedding: {counts.embedding:,}")
    first = 0
    for i in range(1, len(counts.blocks) + 1):
        if i == len(counts.blocks) or counts.blocks[i] != counts.blocks[first]:
            name = f"block {first}" if i - first == 1 else f"blocks {first}-{i - 1}, each"
            lines.append(f"  {name}: {counts.blocks[first]:,}")
            first = i
    lines.append(f"  norm: {counts.norm:,}")
    lines.append(f"  lm_head: {counts.lm_head:,}" + (" (tied)" if config.tie_word_embeddings else ""))
    return lines


def summarize(config: ModelConfig, seq_len: int = 256) -> str:
    """Return the whole summary of `config` that `smolseek inspect` prints."""
    seq_len = min(seq_len, config.max_position_embeddings)
    lines = parameter_lines(config) + ["Architecture:"] + [f"  {line}" for line in architecture(config)]
    cached = cache_bytes(config)
    lines.append("Cache per token in bf16: " + ", ".join(f"{name} {size_text(size)}" for name, size in cached.items()))
    forward = flops_per_token(config, seq_len)
    lines.append(
        f"Arithmetic per token at {seq_len} tokens: {forward / 1e6:,.1f} MFLOP forward, "
        f"{3 * forward / 1e6:,.1f} MFLOP in training"
    )
    return "\n".join(lines)
