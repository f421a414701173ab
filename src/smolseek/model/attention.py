"""Attention: multi-head latent (MLA, DeepSeek-V2 2405.04434 section 2.1) and grouped-query (2305.13245).

Shapes: B batch, T new tokens, A last tokens that have queries, S cached and new tokens, D hidden_size, H query heads, G
key/value heads, Q features of a query head (in MLA: N without RoPE and R with RoPE), V features of a value head, L
kv_lora_rank, X features of all heads together.
"""

import torch
from torch import nn

from smolseek.config import ModelConfig
from smolseek.model.cache import KVCache
from smolseek.model.layers import Linear, RMSNorm
from smolseek.model.rope import softmax_scale
from smolseek.ops.causal_attention import causal_attention
from smolseek.ops.mla_attention import CosSin, absorbed_attention, mla_attention, per_head
from smolseek.ops.rotary import rotate


class MLA(nn.Module):
    """Multi-head latent attention: keys and values are computed from one small latent per token.

    Equations 9-19 are c = RMSNorm(W_DKV x), k_pe = RoPE(W_KR x), [k_nope; v]_h = W_UKV,h c, and q_h = [q_nope;
    RoPE(q_pe)].
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank = config.kv_lora_rank
        self.interleave = config.rope_interleave
        self.scale = softmax_scale(config.rope_parameters, config.qk_head_dim)
        D, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, self.heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.qk_head_dim, bias=False)
        self.compressed_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(D, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, config.latent_norm_eps) if config.latent_norm else nn.Identity()
        self.kv_b_proj = Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(self.heads * self.value, D, bias=bias)

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: CosSin, cache: KVCache | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Return the output of causal attention [B, A, D].

        If there is a cache, the new tokens follow the cached tokens.

        `last` is A, the number of final tokens that have queries; None means all tokens.
        """
        T = x_BTD.shape[1]
        x_BAD = x_BTD if last is None else x_BTD[:, T - last :]
        if self.compressed_query:
            q_BAX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BAD)))
        else:
            q_BAX = self.q_proj(x_BAD)
        c_BTL, pe_BTR = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.rope], dim=-1)
        c_BTL = self.kv_a_layernorm(c_BTL)
        sizes = self.heads, self.nope, self.value
        if cache is not None:
            rotated = rotate(pe_BTR, *cos_sin, interleave=self.interleave)
            cached_BSF = cache.append(self.layer, torch.cat((c_BTL, rotated), dim=-1))
            S = cached_BSF.shape[1]
            if S > T:  # with few queries, attention on the latents is cheaper
                cos, sin = (c if last is None else c[..., T - last :, :] for c in cos_sin)
                inputs = q_BAX, self.kv_b_proj.weight, cached_BSF, cache.unseen(S), (cos, sin)
                return self.o_proj(absorbed_attention(*inputs, sizes, self.scale, self.interleave))
        kv_BTX = self.kv_b_proj(c_BTL)
        return self.o_proj(mla_attention(q_BAX, kv_BTX, pe_BTR, cos_sin, sizes, self.scale, self.interleave))


class GQA(nn.Module):
    """Grouped-query attention with RoPE on queries and keys, as in Llama."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
        self.scale = self.size**-0.5
        D = config.hidden_size
        self.q_proj = Linear(D, self.heads * self.size, bias=False)
        self.k_proj = Linear(D, self.groups * self.size, bias=False)
        self.v_proj = Linear(D, self.groups * self.size, bias=False)
        self.o_proj = Linear(self.heads * self.size, D, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: CosSin, cache: KVCache | None = None, last: int | None = None
    ) -> torch.Tensor:
        """Compute causal attention, with the arguments of `MLA.forward`."""
        T = x_BTD.shape[1]
        A = T if last is None else last
        cos, sin = (per_head(c) for c in cos_sin)
        q_BHAQ = self.q_proj(x_BTD[:, T - A :]).unflatten(2, (self.heads, self.size)).transpose(1, 2)
        k_BGTQ = self.k_proj(x_BTD).unflatten(2, (self.groups, self.size)).transpose(1, 2)
        v_BTX = self.v_proj(x_BTD)
        q_BHAQ = rotate(q_BHAQ, cos[..., T - A :, :], sin[..., T - A :, :], interleave=False)
        k_BGSQ = rotate(k_BGTQ, cos, sin, interleave=False)
        unseen_B1S = None
        if cache is not None:
            k_BTX = k_BGSQ.transpose(1, 2).flatten(2)
            cached = cache.append(self.layer, torch.cat((k_BTX, v_BTX), dim=-1)).to(q_BHAQ.dtype)
            unseen_B1S = cache.unseen(cached.shape[1])
            k_BSX, v_BTX = cached.chunk(2, dim=-1)
            k_BGSQ = k_BSX.unflatten(2, (self.groups, self.size)).transpose(1, 2)
        v_BGSQ = v_BTX.unflatten(2, (self.groups, self.size)).transpose(1, 2)
        return self.o_proj(causal_attention(q_BHAQ, k_BGSQ, v_BGSQ, self.scale, unseen_B1S))
