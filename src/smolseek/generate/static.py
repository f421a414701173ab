"""A decoding step of fixed shapes, which CUDA can capture once as a graph and replay for every token.

The other exception to "the forward pass stands once": launching some thousand small kernels a token takes longer than
running them; a graph is one launch. Its kernels find the same shapes and addresses each time: attention runs over the
whole capacity with a mask of what is not yet there, and no number of tokens of an expert is asked for.

Shapes: B rows, D hidden_size, E routed experts, K chosen, V vocab_size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from smolseek.model.cache import Cache
from smolseek.model.moe import MoE
from smolseek.model.transformer import Block, CausalLM


class StaticStep:
    """One token of each row through the model; captured as a CUDA graph if `graph`, anew when rows come or go.

    Args:
        model: the model.
        cache: has room for more than one token, and stays where it lies.
        graph: capture and replay; False runs the same operations one by one, on any device.
    """

    def __init__(self, model: CausalLM, cache: Cache, *, graph: bool) -> None:
        assert cache.capacity > 1
        device = model.lm_head.weight.device
        self._model, self._cache, self._graph = model, cache, graph
        self._ids, self._positions = (torch.zeros(cache.rows, dtype=torch.int64, device=device) for _ in range(2))
        self._captured: torch.cuda.CUDAGraph | None = None
        self._logits_BV: torch.Tensor | None = None

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Append a token to each row, at its position -> logits [B, V] in float32."""
        B, device = len(tokens), self._ids.device
        assert self._cache.rows == B and max(positions) < self._cache.capacity
        if self._ids.shape[0] != B:
            self._ids, self._positions = (torch.zeros(B, dtype=torch.int64, device=device) for _ in range(2))
            self._captured = None
        self._ids.copy_(torch.tensor(tokens))
        self._positions.copy_(torch.tensor(positions))
        if not self._graph:
            return self._run()
        if self._captured is None:
            with torch.cuda.device(device):
                self._capture()
        assert self._captured is not None and self._logits_BV is not None
        self._captured.replay()
        return self._logits_BV.clone()

    def _capture(self) -> None:
        """Run a few times on another stream, as CUDA asks for, then capture. The cache gets the same token again."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self._captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._captured):
            self._logits_BV = self._run()

    def _run(self) -> torch.Tensor:
        decoder, cache = self._model.model, self._cache
        # As if all but one token of the capacity were there: so the shapes are those of the full cache, while
        # each row's own length says where it writes and what it may not see.
        cache.length, cache.lengths_B = cache.capacity - 1, self._positions
        cos_sin = decoder.rope.each(self._positions[:, None])
        x_B1D = decoder.embed_tokens(self._ids[:, None])
        for block in decoder.layers:
            assert isinstance(block, Block)
            x_B1D = x_B1D + block.self_attn(block.input_layernorm(x_B1D), cos_sin, cache)
            h_B1D = block.post_attention_layernorm(x_B1D)
            if isinstance(block.mlp, MoE):
                x_B1D = x_B1D + experts(block.mlp, h_B1D[:, 0])[:, None]
            else:
                x_B1D = x_B1D + block.mlp(h_B1D)
        return self._model.lm_head(decoder.norm(x_B1D[:, 0])).float()


def experts(moe: MoE, x_BD: torch.Tensor) -> torch.Tensor:
    """As `MoE.forward`, with shapes that do not depend on who was chosen -> [B, D].

    Few tokens fetch the matrices of their experts; of many, every expert computes all, and each token takes its own.
    """
    routing, stacked = moe.gate(x_BD), moe.experts
    first = stacked.gate_up_proj if stacked.gated else stacked.up_proj
    chosen_BK = routing.experts_NK
    few = chosen_BK.numel() < first.shape[0]
    if few:
        pick = chosen_BK.flatten()
        x_X1D = x_BD.repeat_interleave(chosen_BK.shape[1], dim=0)[:, None]
    else:
        pick = torch.arange(first.shape[0], device=x_BD.device)
        x_X1D = x_BD.expand(first.shape[0], -1, -1)
    h = x_X1D @ _of(first, pick, few).transpose(1, 2)
    if stacked.up_bias is not None:
        h = h + _of(stacked.up_bias, pick, few)[:, None]
    if stacked.gated:
        gate, up = h.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        h = F.silu(h)
    y = h @ _of(stacked.down_proj, pick, few).transpose(1, 2)
    if stacked.down_bias is not None:
        y = y + _of(stacked.down_bias, pick, few)[:, None]
    if few:
        y_BKD = y.view(*chosen_BK.shape, -1)
    else:
        y_BKD = y[chosen_BK, torch.arange(x_BD.shape[0], device=x_BD.device)[:, None]]
    y_BD = (y_BKD * routing.weights_NK[..., None]).sum(dim=1).to(x_BD.dtype)
    if moe.n_shared_experts:
        assert moe.shared_experts is not None
        y_BD = y_BD + moe.shared_experts(x_BD)
    return y_BD


def _of(stack: torch.Tensor, pick: torch.Tensor, few: bool) -> torch.Tensor:
    """Return the picked part of a stack; all of it without a copy."""
    return stack[pick] if few else stack
