"""A decoding step of fixed shapes, which CUDA can capture once as a graph and replay for every token.

The forward pass is written once in `model/`, with two exceptions: this file and `cpu_decode.py`. Launching some
thousand small kernels per token takes longer than running them, but a CUDA graph is a single launch. The kernels of a
graph need the same shapes and addresses each time. Therefore attention covers the full capacity of the cache with a
mask, and the shapes of the experts do not depend on the routing.

Shapes: B sequences, D hidden_size, E routed experts, K selected experts, V vocab_size, X experts whose matrices are
used.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from smolseek.device import capability
from smolseek.model.cache import Cache
from smolseek.model.moe import MoE
from smolseek.model.transformer import Block, CausalLM


class StaticStep:
    """Runs one token of each sequence through the model, on a GPU as a CUDA graph.

    The graph is captured again if the batch size changes. On a CPU the same operations run one by one.

    Args:
        model: the model.
        cache: a cache for more than one token, whose memory address does not change.
    """

    def __init__(self, model: CausalLM, cache: Cache) -> None:
        assert cache.capacity > 1
        self._model, self._cache = model, cache
        self._ids = self._positions = torch.zeros(0, dtype=torch.int64, device=model.lm_head.weight.device)
        self._captured: torch.cuda.CUDAGraph | None = None
        self._logits_BV = torch.empty(0)

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Append a token to each sequence at its position. Return logits [B, V] in float32."""
        assert self._cache.batch == len(tokens) and max(positions) < self._cache.capacity
        if len(self._ids) != len(tokens):
            self._ids, self._positions = (self._ids.new_zeros(len(tokens)) for _ in range(2))
            self._captured = None
        self._ids.copy_(torch.tensor(tokens))
        self._positions.copy_(torch.tensor(positions))
        if not capability(self._ids.device).cuda_graphs:
            return self._run()
        if self._captured is None:
            with torch.cuda.device(self._ids.device):
                self._captured = self._capture()
        self._captured.replay()
        return self._logits_BV.clone()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Run a few times on another stream, as CUDA requires, then capture. Each of these runs caches the same token
        again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits_BV = self._run()
        return graph

    def _run(self) -> torch.Tensor:
        decoder, cache = self._model.model, self._cache
        # The cache's length is set to its capacity minus one, so that all shapes are those of a full cache. The length
        # of each sequence says where its token is written and which positions are masked.
        cache.length, cache.lengths_B = cache.capacity - 1, self._positions
        cos_sin = decoder.rope.each(self._positions[:, None])
        x_B1D = decoder.embed_tokens(self._ids[:, None])
        for block in decoder.layers:
            assert isinstance(block, Block)
            x_B1D = block.attend(x_B1D, cos_sin, cache)
            h_B1D = block.post_attention_layernorm(x_B1D)
            if isinstance(block.mlp, MoE):
                x_B1D = x_B1D + experts(block.mlp, h_B1D[:, 0])[:, None]
            else:
                x_B1D = x_B1D + block.mlp(h_B1D)
        return self._model.lm_head(decoder.norm(x_B1D[:, 0])).float()


def experts(moe: MoE, x_BD: torch.Tensor) -> torch.Tensor:
    """Return the output [B, D] of an MoE layer, computed with shapes that do not depend on the routing.

    For few tokens, the matrices of the selected experts are gathered. For many tokens, every expert computes all
    tokens, and each token takes the results of its selected experts.
    """
    routing, stacked = moe.gate(x_BD), moe.experts
    w_up = stacked.gate_up_proj if stacked.gated else stacked.up_proj
    chosen_BK = routing.experts_NK
    few = chosen_BK.numel() < w_up.shape[0]

    def used(stack: torch.Tensor) -> torch.Tensor:
        return stack[chosen_BK.flatten()] if few else stack

    if few:
        x_XND = x_BD.repeat_interleave(chosen_BK.shape[1], dim=0)[:, None]
    else:
        x_XND = x_BD.expand(w_up.shape[0], -1, -1)
    h = x_XND @ used(w_up).transpose(1, 2)
    if stacked.up_bias is not None:
        h = h + used(stacked.up_bias)[:, None]
    if stacked.gated:
        gate, up = h.chunk(2, dim=-1)
        h = F.silu(gate) * up
    else:
        h = F.silu(h)
    y = h @ used(stacked.down_proj).transpose(1, 2)
    if stacked.down_bias is not None:
        y = y + used(stacked.down_bias)[:, None]
    if few:
        y_BKD = y.view(*chosen_BK.shape, -1)
    else:
        y_BKD = y[chosen_BK, torch.arange(x_BD.shape[0], device=x_BD.device)[:, None]]
    y_BD = (y_BKD * routing.weights_NK[..., None]).sum(dim=1).to(x_BD.dtype)
    if moe.n_shared_experts:
        assert moe.shared_experts is not None
        y_BD = y_BD + moe.shared_experts(x_BD)
    return y_BD
