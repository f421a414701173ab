"""Reading a prompt: the model's forward pass with only the work that the next token needs.

In the last layer only the last tokens ask; the others leave their keys and values in the cache and end there. Nothing
is kept for a gradient, so the experts write into one tensor, and their activation is one operation for all of them.

Shapes: T tokens of the prompt, D hidden_size, E routed experts, K chosen, F neurons of an expert, M = T*K pairs of
token and expert, sorted by expert.
"""

import torch
import torch.nn.functional as F

from smolseek.model.cache import Cache
from smolseek.model.moe import MLP, MoE
from smolseek.model.transformer import Block, CausalLM


@torch.inference_mode()
def prefill(model: CausalLM, ids_1T: torch.Tensor, cache: Cache, last: int = 1) -> torch.Tensor:
    """Read a prompt (int64) into an empty cache of one row -> the logits [last, V] after its last tokens."""
    decoder, T = model.model, ids_1T.shape[1]
    assert cache.length == 0 and ids_1T.shape[0] == 1 and 0 < last <= T
    cos_sin = decoder.rope(torch.arange(T, device=ids_1T.device), T)
    x_1TD = decoder.embed_tokens(ids_1T)
    for number, block in enumerate(decoder.layers, 1):
        assert isinstance(block, Block)
        asking = last if number == len(decoder.layers) else T
        attended = block.self_attn(block.input_layernorm(x_1TD), cos_sin, cache, asking)
        x_1TD = attended + x_1TD[:, T - asking :]
        h_TD = block.post_attention_layernorm(x_1TD)[0]
        x_1TD = x_1TD + (_experts(block.mlp, h_TD) if isinstance(block.mlp, MoE) else _mlp(block.mlp, h_TD))
    cache.advance(T)
    return model.lm_head(decoder.norm(x_1TD[0]))


def _mlp(mlp: MLP, x_TD: torch.Tensor) -> torch.Tensor:
    """As `MLP.forward`, in place where it can be."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x_TD), inplace=True).mul_(mlp.up_proj(x_TD)))


def _experts(moe: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """As `MoE.forward`, without the load."""
    routing, experts = moe.gate(x_TD), moe.experts
    T, K = routing.experts_NK.shape
    chosen_M = routing.experts_NK.flatten()
    order_M = chosen_M.argsort(stable=True)
    counts_E = torch.bincount(chosen_M, minlength=routing.scores_NE.shape[1]).tolist()
    x_MD = x_TD[order_M // K]
    first = experts.gate_up_proj if experts.gated else experts.up_proj
    h_MX = _products(x_MD, counts_E, first, experts.up_bias)
    if experts.gated:
        gate_MF, up_MF = h_MX.chunk(2, dim=-1)
        h_MX = F.silu(gate_MF).mul_(up_MF)
    else:
        h_MX = F.silu(h_MX, inplace=True)
    y_MD = _products(h_MX, counts_E, experts.down_proj, experts.down_bias)
    y_MD *= routing.weights_NK.flatten()[order_M, None].to(y_MD.dtype)
    y_TD = y_MD[order_M.argsort()].view(T, K, -1).sum(dim=1)
    if moe.n_shared_experts:
        assert moe.shared_experts is not None
        y_TD += _mlp(moe.shared_experts, x_TD)
    return y_TD


def _products(x_MD: torch.Tensor, counts_E: list[int], w_EFD: torch.Tensor, b_EF: torch.Tensor | None) -> torch.Tensor:
    """Multiply each expert's rows with its matrix, and add its bias -> [M, F]."""
    y_MF = x_MD.new_empty(x_MD.shape[0], w_EFD.shape[1])
    for e, (x_XD, y_XF) in enumerate(zip(x_MD.split(counts_E), y_MF.split(counts_E), strict=True)):
        if not x_XD.shape[0]:
            continue
        if b_EF is None:
            torch.mm(x_XD, w_EFD[e].t(), out=y_XF)
        else:
            torch.addmm(b_EF[e], x_XD, w_EFD[e].t(), out=y_XF)
    return y_MF
