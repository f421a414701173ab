"""Attention: multi-head latent (MLA, DeepSeek-V2 2405.04434 section 2.1) and grouped-query (2305.13245).

Shapes: B batch, T new tokens, S tokens seen (cached and new), D hidden_size, H query heads, G key/value heads,
Q features of a query head (N without and R with position, for MLA), V of a value head, L kv_lora_rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

from smolseek.config import ModelConfig
from smolseek.model import fused
from smolseek.model.cache import Cache
from smolseek.model.norm import RMSNorm
from smolseek.model.rope import rotate, softmax_scale

CosSin = tuple[torch.Tensor, torch.Tensor]


def _causal_mask(new: int, seen: int, device: torch.device) -> torch.Tensor:
    """Return [T, S], true where new token t may look at token s: s <= S - T + t."""
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)


def attend(
    q_BHTQ: torch.Tensor,
    k_BGSQ: torch.Tensor,
    v_BGSV: torch.Tensor,
    scale: float,
    unseen_B1S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last T of S tokens -> [B, T, H*V]; `unseen_B1S` is the cache's, for rows unlike long."""
    T, S = q_BHTQ.shape[2], k_BGSQ.shape[2]
    grouped = q_BHTQ.shape[1] != k_BGSQ.shape[1]
    mask = _causal_mask(T, S, q_BHTQ.device) if 1 < T < S else None
    if unseen_B1S is not None:
        mask = ~unseen_B1S[:, None]
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTQ, k_BGSQ, v_BGSV, attn_mask=mask, is_causal=T == S and T > 1, scale=scale, enable_gqa=grouped
    )
    return out_BHTV.transpose(1, 2).flatten(2)


def _per_head(cos_or_sin: torch.Tensor) -> torch.Tensor:
    """Make room for the heads where every row has positions of its own: [B, T, P] -> [B, 1, T, P]; [T, P] stays."""
    return cos_or_sin if cos_or_sin.ndim == 2 else cos_or_sin[:, None]


class MLA(nn.Module):
    """Multi-head latent attention: keys and values are read from one small latent per token.

    c = RMSNorm(W_DKV x), k_pe = RoPE(W_KR x), [k_nope; v]_h = W_UKV,h c, q_h = [q_nope; RoPE(q_pe)] (equations 9-19).
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
        # The two latent norms keep epsilon 1e-6 whatever rms_norm_eps says, as transformers has it.
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, self.heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * config.qk_head_dim, bias=False)
        self.compressed_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(D, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank) if config.latent_norm else nn.Identity()
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, D, bias=bias)

    def forward(self, x_BTD: torch.Tensor, cos_sin: CosSin, cache: Cache | None = None) -> torch.Tensor:
        """Attend causally -> [B, T, D]. With a cache the new tokens come after those it holds."""
        B, T, _ = x_BTD.shape
        if self.compressed_query:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        else:
            q = self.q_proj(x_BTD)
        if cache is None and torch.is_grad_enabled() and fused.fits(q, self.nope, self.rope, self.value):
            return self._fused(q, x_BTD, cos_sin)
        if cache is None and fused.joins(q):
            return self._joined(q, x_BTD, cos_sin)
        q_BHTQ = q.view(B, T, self.heads, self.nope + self.rope).transpose(1, 2)
        q_nope, q_pe = q_BHTQ.split([self.nope, self.rope], dim=-1)
        cos, sin = cos_sin
        q_pe = rotate(q_pe, _per_head(cos), _per_head(sin), interleave=self.interleave)

        c_BTL, k_pe = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.rope], dim=-1)
        c_BTL = self.kv_a_layernorm(c_BTL)
        k_pe = rotate(k_pe, cos, sin, interleave=self.interleave)
        if cache is None:
            out = self._expanded(q_nope, q_pe, c_BTL, k_pe)
        else:
            held = cache.append(self.layer, torch.cat((c_BTL, k_pe), dim=-1))
            if held.shape[1] == T:
                out = self._expanded(q_nope, q_pe, c_BTL, k_pe)
            else:
                out = self._absorbed(q_nope, q_pe, held, cache.unseen(held.shape[1]))
        return self.o_proj(out)

    def _fused(self, q_BTX: torch.Tensor, x_BTD: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """The same as `forward` without a cache, through attention.c."""
        c_BTL, pe_BTR = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.rope], dim=-1)
        kv_BTX = self.kv_b_proj(self.kv_a_layernorm(c_BTL))
        sizes = self.heads, self.nope, self.value
        return self.o_proj(fused.latent_attention(q_BTX, kv_BTX, pe_BTR, *cos_sin, sizes, self.scale, self.interleave))

    def _joined(self, q_BTX: torch.Tensor, x_BTD: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
        """The same, with one kernel between the projections and PyTorch's attention."""
        c_BTL, pe_BTR = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.rope], dim=-1)
        kv_BTX = self.kv_b_proj(self.kv_a_layernorm(c_BTL))
        sizes = self.heads, self.nope, self.value
        q, k, v = fused.join(q_BTX, kv_BTX, pe_BTR, *cos_sin, sizes, self.interleave)
        return self.o_proj(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale))

    def _expanded(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, c_BSL: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        """Make every head's keys and values from the latents: the cheap way when all tokens are new."""
        B, S, _ = c_BSL.shape
        kv = self.kv_b_proj(c_BSL).view(B, S, self.heads, self.nope + self.value).transpose(1, 2)
        k_nope, v_BHSV = kv.split([self.nope, self.value], dim=-1)
        k_pe = k_pe[:, None].expand(-1, self.heads, -1, -1)
        q_BHTQ = torch.cat((q_nope, q_pe), dim=-1)
        k_BHSQ = torch.cat((k_nope, k_pe), dim=-1)
        return attend(q_BHTQ, k_BHSQ, v_BHSV, self.scale)

    def _absorbed(
        self, q_nope: torch.Tensor, q_pe: torch.Tensor, held_BSF: torch.Tensor, unseen_B1S: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend on the latents themselves: W_UK goes into the query and W_UV behind the sum (section 2.1.2)."""
        B, H, T, _ = q_nope.shape
        S = held_BSF.shape[1]
        w_HXL = self.kv_b_proj.weight.to(q_nope.dtype).view(H, self.nope + self.value, self.rank)
        w_uk_HNL, w_uv_HVL = w_HXL.split([self.nope, self.value], dim=1)
        q_BHTF = torch.cat((torch.einsum("bhtn,hnl->bhtl", q_nope, w_uk_HNL), q_pe), dim=-1)
        held_BSF = held_BSF.to(q_BHTF.dtype)
        scores = (q_BHTF.flatten(1, 2) @ held_BSF.transpose(1, 2)).view(B, H, T, S).float() * self.scale
        if T > 1:
            scores = scores.masked_fill(~_causal_mask(T, S, scores.device), float("-inf"))
        if unseen_B1S is not None:
            scores = scores.masked_fill(unseen_B1S[:, None], float("-inf"))
        p_BHTS = scores.softmax(dim=-1).to(q_BHTF.dtype)
        sum_BHTL = (p_BHTS.flatten(1, 2) @ held_BSF[..., : self.rank]).view(B, H, T, self.rank)
        return torch.einsum("bhtl,hvl->bthv", sum_BHTL, w_uv_HVL).flatten(2)


class GQA(nn.Module):
    """Grouped-query attention with RoPE on queries and keys, as in Llama."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.groups, self.size = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
        self.scale = self.size**-0.5
        D = config.hidden_size
        self.q_proj = nn.Linear(D, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(D, self.groups * self.size, bias=False)
        self.v_proj = nn.Linear(D, self.groups * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, D, bias=False)

    def forward(self, x_BTD: torch.Tensor, cos_sin: CosSin, cache: Cache | None = None) -> torch.Tensor:
        """Attend causally -> [B, T, D]. With a cache the new tokens come after those it holds."""
        B, T, _ = x_BTD.shape
        cos, sin = cos_sin
        q_BHTQ = self.q_proj(x_BTD).view(B, T, self.heads, self.size).transpose(1, 2)
        k_BGTQ = self.k_proj(x_BTD).view(B, T, self.groups, self.size).transpose(1, 2)
        v_BTX = self.v_proj(x_BTD)
        cos, sin = _per_head(cos), _per_head(sin)
        q_BHTQ = rotate(q_BHTQ, cos, sin, interleave=False)
        k_BGSQ = rotate(k_BGTQ, cos, sin, interleave=False)
        unseen_B1S = None
        if cache is not None:
            k_BTX = k_BGSQ.transpose(1, 2).flatten(2)
            held = cache.append(self.layer, torch.cat((k_BTX, v_BTX), dim=-1)).to(q_BHTQ.dtype)
            unseen_B1S = cache.unseen(held.shape[1])
            k_BSX, v_BTX = held.chunk(2, dim=-1)
            k_BGSQ = k_BSX.unflatten(2, (self.groups, self.size)).transpose(1, 2)
        v_BGSQ = v_BTX.unflatten(2, (self.groups, self.size)).transpose(1, 2)
        return self.o_proj(attend(q_BHTQ, k_BGSQ, v_BGSQ, self.scale, unseen_B1S))
