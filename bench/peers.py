"""Opens models of other trainers with the size of one of our models, for bench/train_step.py --against.

nanochat (92d63d4 was tried) trains dense models only. nanochat's GPT gets the width and heads of our model, and a
number of layers that takes the same number of operations per token. nanochat is not a package, so a clone of its
repository must be on PYTHONPATH.

litgpt (0.5.13 was tried) has multi-head latent attention and DeepSeek's experts. But litgpt supports neither queries
without a latent nor a sigmoid router without groups. Therefore litgpt's queries get a latent whose size takes the same
number of operations, and its router uses a softmax.

torchtitan (0.3.0) cannot be measured on a CPU: its language models use FlexAttention or variable-length flash
attention, for which PyTorch has no backward pass on a CPU.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from smolseek.config import ModelConfig
from smolseek.model.summary import flops_per_token

PEERS = ("litgpt", "nanochat", "torchtitan")


def unable(peer: str, device: str) -> str | None:
    """Return why `peer` cannot be measured here, or None if it can."""
    if peer == "torchtitan":
        return "torchtitan's attention trains on CUDA only" if device == "cpu" else "torchtitan was never tried on CUDA"
    if peer == "nanochat":
        return None if find_spec("nanochat") else "no nanochat: clone it and set PYTHONPATH to the clone"
    try:
        from litgpt.model import MultiheadLatentAttention  # noqa: F401
    except ImportError as absent:
        return f"{absent}: pip install 'litgpt>=0.5.13'"
    return None


Loss = Callable[[torch.Tensor], torch.Tensor]
"""Computes the loss of sequences [B, T+1] as the peer's trainer does."""


def open_peer(peer: str, config: ModelConfig, device: str, length: int, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    """Return the peer's model, newly initialised, and its loss of sequences of `length` tokens.

    The model multiplies matrices in the type `dtype`.
    """
    return _nanochat(config, device, length, dtype) if peer == "nanochat" else _litgpt(config, device)


def nanochat_layers(config: ModelConfig, length: int) -> int:
    """Return how many layers of nanochat's GPT take as many operations per token as our model.

    A layer has four attention matrices [D, D] and two MLP matrices [D, 4D], and attends to `length` / 2 tokens.
    """
    D = config.hidden_size
    layer = 2 * 12 * D * D + 2 * D * length
    return round((flops_per_token(config, length) - 2 * D * config.vocab_size) / layer)


def _nanochat(config: ModelConfig, device: str, length: int, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")  # read when nanochat is imported
    from nanochat.gpt import GPT, GPTConfig

    shape = GPTConfig(
        sequence_len=length,
        vocab_size=config.vocab_size,
        n_layer=nanochat_layers(config, length),
        n_head=config.num_attention_heads,
        n_kv_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = GPT(shape)
    model.to_empty(device=device)
    model.init_weights()
    return model, lambda sequences: model(sequences[:, :-1], sequences[:, 1:].contiguous())


def _litgpt(config: ModelConfig, device: str) -> tuple[nn.Module, Loss]:
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
            # x W_a W_b takes r (D + queries) multiplications per token, x W takes D * queries.
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
