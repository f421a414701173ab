"""The decoder-only transformer: one class for DeepSeek-V3, Llama and the model of the seed experiment.

Shapes: B batch, T new tokens, D hidden_size, V vocab_size, L layers with experts, E routed experts.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from smolseek.config import ModelConfig
from smolseek.model.attention import GQA, MLA
from smolseek.model.cache import KVCache
from smolseek.model.layers import Embedding, Head, RMSNorm, allocate
from smolseek.model.moe import MLP, Load, MoE, Router
from smolseek.model.rope import Rope
from smolseek.ops.embedding import accumulated_embedding
from smolseek.ops.mla_attention import CosSin

if TYPE_CHECKING:
    from smolseek.model.recompute import Checkpointing


class Block(nn.Module):
    """A layer of the decoder: attention and a feed-forward layer, each after a norm and with a residual connection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MLA(config, layer) if config.is_mla else GQA(config, layer)
        self.mlp = MoE(config) if config.is_moe_layer(layer) else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_sin: CosSin,
        cache: KVCache | None = None,
        last: int | None = None,
        accumulate: bool = False,
    ) -> tuple[torch.Tensor, Load | None]:
        """Return the residual stream [B, T, D] after the layer, and the load of its experts or None.

        `last` and `accumulate` have the meaning that they have in `CausalLM.hidden`.
        """
        return self.apply_mlp(self.attend(x_BTD, cos_sin, cache, last), accumulate)

    def attend(
        self, x_BTD: torch.Tensor, cos_sin: CosSin, cache: KVCache | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Return the residual stream [B, T, D] after attention, for all tokens or only for the final `last` tokens."""
        h_BTD = self.self_attn(self.input_layernorm(x_BTD), cos_sin, cache, last)
        return (x_BTD if last is None else x_BTD[:, -last:]) + h_BTD

    def apply_mlp(self, x_BTD: torch.Tensor, accumulate: bool = False) -> tuple[torch.Tensor, Load | None]:
        """Return the residual stream [B, T, D] after the feed-forward part, and the load of its experts or None."""
        h_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, load = self.mlp(h_BTD, accumulate)
            return x_BTD + y_BTD, load
        return x_BTD + self.mlp(h_BTD), None


def call_block(block: Any, x_BTD: torch.Tensor, cos_sin: CosSin, accumulate: bool) -> tuple[torch.Tensor, Load | None]:
    """Call one layer as in training. All layers share this function, so that torch.compile compiles it only once."""
    return block(x_BTD, cos_sin, accumulate=accumulate)


class Decoder(nn.Module):
    """Embedding, blocks and the last norm. In a checkpoint, this module has the name `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.rope_parameters, config.rope_dim, config.max_position_embeddings)


class Hidden(NamedTuple):
    """The decoder's output."""

    hidden_BTD: torch.Tensor
    """Normalised last hidden state."""
    load_LE: torch.Tensor
    """Number of routed slots (token, expert) of each expert in each layer (int64); shape [0, 0] without experts."""
    balance: torch.Tensor
    """Sequence-wise balance loss, summed over the layers, before it is multiplied by alpha."""


class CausalLM(nn.Module):
    """A language model that maps token ids to logits of the next token.

    Parameters have Hugging Face's names, and the routed experts are stacked. `new_model` builds a model with initial
    weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing: Checkpointing = "none"
        self.call_block = call_block
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding with the head if the configuration says so.

        Call this method again after assigning weights.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_buffers(self) -> None:
        """Compute RoPE's frequencies, which checkpoints omit.

        Call this method after building the model on the meta device.
        """
        self.model.rope.reset_buffers()

    @property
    def routers(self) -> list[Router]:
        """The routers of the layers with experts, in order."""
        return [block.mlp.gate for block in self.model.layers if isinstance(block.mlp, MoE)]

    def hidden(
        self, ids_BT: torch.Tensor, cache: KVCache | None = None, *, last: int | None = None, accumulate: bool = False
    ) -> Hidden:
        """Run the decoder on `ids_BT`, the tokens that follow those in `cache`.

        Args:
            ids_BT: token ids (int64).
            cache: the cache with the earlier tokens; the new tokens are appended to it.
            last: number of final tokens whose hidden states are returned; None returns all hidden states. The last
                layer computes queries for these final tokens only.
            accumulate: on a CPU, the backward pass adds the gradients of experts and embedding to their `.grad` in
                place. Autograd does not see these gradients, so use `accumulate` only with `backward()` and not with
                `torch.autograd.grad`.
        """
        T = ids_BT.shape[1]
        start = cache.length if cache is not None else 0
        if cache is not None and cache.lengths_B is not None:
            cos_sin = self.model.rope.each(cache.lengths_B[:, None])
        else:
            positions = torch.arange(start, start + T, device=ids_BT.device)
            cos_sin = self.model.rope(positions, start + T)
        table = self.model.embed_tokens
        x_BTD = accumulated_embedding(ids_BT, table.weight) if accumulate else table(ids_BT)
        loads: list[Load] = []
        for number, block in enumerate(self.model.layers, 1):
            if self.grad_checkpointing != "none" and torch.is_grad_enabled():
                # Imported here, because the import registers operators and loads torch._dynamo, which takes a second.
                from smolseek.model.recompute import checkpointed

                x_BTD, load = checkpointed(block, x_BTD, cos_sin, accumulate, self.grad_checkpointing)
            elif cache is None and torch.is_grad_enabled():
                x_BTD, load = self.call_block(block, x_BTD, cos_sin, accumulate)
            else:
                x_BTD, load = block(x_BTD, cos_sin, cache, last if number == len(self.model.layers) else None)
            if load is not None:
                loads.append(load)
        if cache is not None:
            cache.advance(T)
        if loads:
            load_LE = torch.stack([load.counts_E for load in loads])
            balance = torch.stack([load.balance for load in loads]).sum()
        else:
            load_LE, balance = ids_BT.new_zeros((0, 0)), x_BTD.new_zeros(())
        return Hidden(self.model.norm(x_BTD if last is None else x_BTD[:, -last:]), load_LE, balance)

    def forward(self, ids_BT: torch.Tensor, cache: KVCache | None = None, last: int | None = None) -> torch.Tensor:
        """Return the next-token logits [B, T, V] of all tokens `ids_BT` (int64), or only of the final `last` tokens."""
        return self.lm_head(self.hidden(ids_BT, cache, last=last).hidden_BTD)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from N(0, initializer_range^2); set norms to 1 and biases to 0 (DeepSeek-V3, section 4.2)."""
        for name, parameter in self.named_parameters():
            draw_weight(name, parameter, self.config.initializer_range, generator)
        for router in self.routers:
            router.e_score_correction_bias.zero_()


@torch.no_grad()
def draw_weight(name: str, weight: torch.Tensor, deviation: float, generator: torch.Generator | None) -> None:
    """Fill one parameter as `init_weights` does."""
    if "norm" in name:
        weight.fill_(1.0)
    elif name.endswith("bias"):
        weight.zero_()
    elif weight.numel():
        weight.normal_(0.0, deviation, generator=generator)


@torch.no_grad()
def zero_outputs(model: CausalLM) -> None:
    """Set the matrices that write into the residual stream, o_proj and down_proj, to zero (2203.03466, section 6.1).

    Then every layer begins as the identity.
    """
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()


def new_model(config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> CausalLM:
    """Build a model with random float32 weights; the same seed gives the same weights."""
    with torch.device("meta"):
        model = CausalLM(config)
    allocate(model, device)
    model.tie_weights()
    model.reset_buffers()
    model.init_weights(torch.Generator(device).manual_seed(seed))
    return model
