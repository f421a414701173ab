"""Other trainers' models in the shape of one of ours, for bench/train_step.py --against.

litgpt (0.5.13 was tried) has multi-head latent attention and DeepSeek's experts, but no query without a latent and no
sigmoid router without groups. Its query gets a latent of a size that takes as many operations, its router a softmax.

torchtitan (0.3.0) cannot be measured on a CPU: its language models use FlexAttention or variable-length flash
attention, for which PyTorch has no backward pass on a CPU.
"""

from collections.abc import Callable

import torch
from torch import nn

from smolseek.config import ModelConfig

PEERS = ("litgpt", "torchtitan")


def unable(peer: str, device: str) -> str | None:
    """Return why `peer` cannot be measured here, or None if it can."""
    if peer == "torchtitan":
        return "torchtitan's attention trains on CUDA only" if device == "cpu" else "torchtitan was never tried on CUDA"
    try:
        from litgpt.model import MultiheadLatentAttention  # noqa: F401
    except ImportError as absent:
        return f"{absent}: pip install 'litgpt>=0.5.13'"
    return None


def open_peer(peer: str, config: ModelConfig, device: str) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the peer's model, newly initialised, and its loss of sequences [B, T+1], as in its trainer."""
    assert peer == "litgpt"
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    D, queries = config.hidden_size, config.num_attention_heads * config.qk_head_dim
    shape = Config(
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_embd=D,
        n_head=config.num_attention_heads,
        latent_attention={
            # x W_a W_b takes r (D + queries) products a token, x W takes D * queries.
            "q_lora_rank": config.q_lora_rank or D * queries // (D + queries) // 16 * 16,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
        },
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE",
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        n_expert=config.n_routed_experts,
        n_shared_expert=config.n_shared_experts,
        n_expert_per_token=config.num_experts_per_tok,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(shape).to(device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=config.initializer_range)
    return model, lambda sequences: chunked_cross_entropy(model(sequences[:, :-1]), sequences[:, 1:])
