"""Reading a prompt: the model's forward pass with only the work that the next token needs.

In the last layer only the last tokens ask; the others leave their keys and values in the cache and end there. Nothing
is kept for a gradient, so experts write into one tensor, and their activation is one operation for all of them. Where
prefill.c fits (`pairs`), it computes products and attention.

Shapes: T tokens of the prompt, A of them that ask (the last ones), D hidden_size, H query heads, G key/value heads,
E routed experts, K chosen, F neurons of an expert, M = T*K pairs of token and expert, sorted by expert.
"""

import torch
import torch.nn.functional as F
from torch import nn

from smolseek.generate.pairs import Pairs
from smolseek.model.attention import GQA, MLA
from smolseek.model.cache import Cache
from smolseek.model.moe import MLP, MoE
from smolseek.model.transformer import Block, CausalLM
from smolseek.ops.causal_attention import causal_attention
from smolseek.ops.mla_attention import CosSin
from smolseek.ops.rotary import rotate


@torch.inference_mode()
def prefill(
    model: CausalLM, ids_T: torch.Tensor, cache: Cache, last: int = 1, pairs: Pairs | None = None
) -> torch.Tensor:
    """Read a prompt (int64) into an empty cache of one row -> the logits [last, V] after its last tokens."""
    decoder, T = model.model, ids_T.shape[0]
    assert cache.length == 0 and cache.rows == 1 and 0 < last <= T
    cos, sin = decoder.rope(torch.arange(T, device=ids_T.device), T)
    cos_sin = (cos[:, None], sin[:, None])  # the same for all heads
    reader = _Reader(pairs)
    x_TD = decoder.embed_tokens(ids_T)
    for number, (block, held) in enumerate(zip(decoder.layers, cache.layers, strict=True), 1):
        assert isinstance(block, Block)
        asking = last if number == len(decoder.layers) else T
        h_TD, attention = block.input_layernorm(x_TD), block.self_attn
        if isinstance(attention, MLA):
            h_AD = reader.mla(attention, h_TD, cos_sin, held[0], asking)
        else:
            h_AD = reader.gqa(attention, h_TD, cos_sin, held[0], asking)
        x_TD = x_TD[T - asking :] + h_AD
        h_TD = block.post_attention_layernorm(x_TD)
        x_TD += reader.experts(block.mlp, h_TD) if isinstance(block.mlp, MoE) else reader.mlp(block.mlp, h_TD)
    cache.advance(T)
    return model.lm_head(decoder.norm(x_TD))


class _Reader:
    """The parts of a layer, through prefill.c or PyTorch."""

    def __init__(self, pairs: Pairs | None) -> None:
        self._pairs = pairs

    def mla(self, mla: MLA, x_TD: torch.Tensor, cos_sin: CosSin, held_CX: torch.Tensor, asking: int) -> torch.Tensor:
        """As `MLA.forward` -> [A, D]; writes the latents into the cache."""
        T, (cos, sin) = x_TD.shape[0], cos_sin
        q_AX = x_TD[T - asking :]
        if mla.compressed_query:
            q_AX = self._linear(mla.q_b_proj, mla.q_a_layernorm(self._linear(mla.q_a_proj, q_AX)))
        else:
            q_AX = self._linear(mla.q_proj, q_AX)
        q_nope, q_pe = q_AX.view(asking, mla.heads, -1).split([mla.nope, mla.rope], dim=-1)
        q_pe = rotate(q_pe, cos[T - asking :], sin[T - asking :], interleave=mla.interleave)
        c_TL, k_pe = self._linear(mla.kv_a_proj_with_mqa, x_TD).split([mla.rank, mla.rope], dim=-1)
        held_CX[:T, : mla.rank] = c_TL = mla.kv_a_layernorm(c_TL)
        held_CX[:T, mla.rank :] = k_pe = rotate(k_pe, cos[:, 0], sin[:, 0], interleave=mla.interleave)
        kv_THX = self._linear(mla.kv_b_proj, c_TL).view(T, mla.heads, -1)
        k_nope, v_THV = kv_THX.split([mla.nope, mla.value], dim=-1)
        q_AHQ = torch.cat((q_nope, q_pe), dim=-1)
        if self._pairs is not None:
            out_AX = self._pairs.attend(q_AHQ, k_nope, k_pe, v_THV, mla.scale)
        else:
            k_THQ = torch.cat((k_nope, k_pe[:, None].expand(-1, mla.heads, -1)), dim=-1)
            out_AX = _attend(q_AHQ, k_THQ, v_THV, mla.scale)
        return self._linear(mla.o_proj, out_AX)

    def gqa(self, gqa: GQA, x_TD: torch.Tensor, cos_sin: CosSin, held_CX: torch.Tensor, asking: int) -> torch.Tensor:
        """As `GQA.forward` -> [A, D]; writes keys and values into the cache."""
        T, (cos, sin) = x_TD.shape[0], cos_sin
        q_AHQ = self._linear(gqa.q_proj, x_TD[T - asking :]).view(asking, gqa.heads, gqa.size)
        q_AHQ = rotate(q_AHQ, cos[T - asking :], sin[T - asking :], interleave=False)
        k_TGQ = rotate(self._linear(gqa.k_proj, x_TD).view(T, gqa.groups, -1), cos, sin, interleave=False)
        v_TX = self._linear(gqa.v_proj, x_TD)
        held_CX[:T] = torch.cat((k_TGQ.flatten(1), v_TX), dim=-1)
        v_TGQ = v_TX.view(T, gqa.groups, -1)
        if self._pairs is not None:
            out_AX = self._pairs.attend(q_AHQ, k_TGQ, None, v_TGQ, gqa.scale)
        else:
            out_AX = _attend(q_AHQ, k_TGQ, v_TGQ, gqa.scale)
        return self._linear(gqa.o_proj, out_AX)

    def mlp(self, mlp: MLP, x_TD: torch.Tensor) -> torch.Tensor:
        """As `MLP.forward`, in place where it can be."""
        if self._pairs is not None:
            h_TF = self._pairs.products(x_TD, mlp.gate_proj.weight[None], mlp.up_proj.weight[None])
        else:
            h_TF = F.silu(mlp.gate_proj(x_TD), inplace=True).mul_(mlp.up_proj(x_TD))
        return self._linear(mlp.down_proj, h_TF)

    def experts(self, moe: MoE, x_TD: torch.Tensor) -> torch.Tensor:
        """As `MoE.forward`, without the load."""
        routing, experts = moe.gate(x_TD), moe.experts
        T, K = routing.experts_NK.shape
        chosen_M = routing.experts_NK.flatten()
        order_M = chosen_M.argsort(stable=True)
        counts_E = torch.bincount(chosen_M, minlength=routing.scores_NE.shape[1])
        places_TK = (
            torch.empty_like(order_M).scatter_(0, order_M, torch.arange(T * K, device=order_M.device)).view(T, K)
        )
        shared_TD = None
        if moe.n_shared_experts:
            assert moe.shared_experts is not None
            shared_TD = self.mlp(moe.shared_experts, x_TD)
        if self._pairs is not None and experts.gated and experts.up_bias is None:
            ends_E = counts_E.cumsum(0)
            gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
            h_MF = self._pairs.products(x_TD, gate_EFD, up_EFD, ends_E=ends_E, tokens_M=order_M // K)
            y_MD = self._pairs.products(h_MF, experts.down_proj, ends_E=ends_E)
            return self._pairs.combine(y_MD, places_TK, routing.weights_NK, shared_TD)
        counts = counts_E.tolist()
        first = experts.gate_up_proj if experts.gated else experts.up_proj
        h_MX = _products(x_TD[order_M // K], counts, first, experts.up_bias)
        if experts.gated:
            gate_MF, up_MF = h_MX.chunk(2, dim=-1)
            h_MX = F.silu(gate_MF).mul_(up_MF)
        else:
            h_MX = F.silu(h_MX, inplace=True)
        y_MD = _products(h_MX, counts, experts.down_proj, experts.down_bias)
        y_TKD = y_MD[places_TK]
        y_TKD *= routing.weights_NK[..., None].to(y_MD.dtype)
        y_TD = y_TKD.sum(dim=1)
        return y_TD if shared_TD is None else y_TD.add_(shared_TD)

    def _linear(self, linear: nn.Linear, x_TD: torch.Tensor) -> torch.Tensor:
        if self._pairs is not None and linear.bias is None:
            return self._pairs.products(x_TD, linear.weight[None])
        return linear(x_TD)


def _attend(q_AHQ: torch.Tensor, k_TGQ: torch.Tensor, v_TGV: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_AHQ, k_TGQ, v_TGV))
    return causal_attention(q, k, v, scale)[0]


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
