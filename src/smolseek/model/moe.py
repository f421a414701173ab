"""DeepSeekMoE (2401.06066; DeepSeek-V3 2412.19437, section 2.1.2): shared and routed experts, without token dropping.

Shapes: B batch, T tokens, N = B*T tokens, D hidden_size, E routed experts, K experts per token, F neurons of an
expert, M = N*K slots (token, expert) sorted by expert.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from smolseek.config import ModelConfig
from smolseek.model.layers import Linear
from smolseek.ops.backend import product_type, triton_supports
from smolseek.ops.grouped_experts import Weights, grouped_experts
from smolseek.ops.linear import linear_swiglu
from smolseek.ops.moe_permute import permute, unpermute
from smolseek.ops.quantized import expanded


class MLP(nn.Module):
    """SwiGLU feed-forward layer (2002.05202): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(linear_swiglu(x, expanded(self.gate_proj.weight), expanded(self.up_proj.weight)))


class Routing(NamedTuple):
    """The router's output for N tokens."""

    weights_NK: torch.Tensor
    """Gate weights of the chosen experts, float32."""
    experts_NK: torch.Tensor
    """Indices of the chosen experts."""
    scores_NE: torch.Tensor
    """Sigmoid affinities of all experts, without the balancing bias, float32."""


class Router(nn.Module):
    """Sigmoid router (equations 12-16). The balancing bias affects the choice of experts, but no gate weights."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """Choose K experts for each token. The computation is in float32 even under autocast."""
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            choice_NE = scores_NE + self.e_score_correction_bias
            if self.groups > 1:
                choice_NE = self._keep_best_groups(choice_NE)
            experts_NK = _best(choice_NE, self.top_k)
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.normalise:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights_NK * self.factor, experts_NK, scores_NE)

    def _keep_best_groups(self, choice_NE: torch.Tensor) -> torch.Tensor:
        """Mask all but the best groups. A group's score is the sum of its two best experts' scores (section 2.1.2)."""
        choice_NGX = choice_NE.unflatten(1, (self.groups, -1))
        group_NG = choice_NGX.topk(2, dim=-1).values.sum(dim=-1)
        best = group_NG.topk(self.top_groups, dim=-1, sorted=False).indices
        mask_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(1, best, False)
        return choice_NGX.masked_fill(mask_NG[..., None], float("-inf")).flatten(1)


def _best(choice_NE: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices [N, k] of the k largest numbers of each token, in any order."""
    if not (triton_supports(choice_NE) and torch.compiler.is_compiling()) or k > 8:
        return choice_NE.topk(k, dim=-1, sorted=False).indices
    # CUDA's topk uses a block of threads for each token, which is slow. When compiled, the following k reductions take
    # no longer than reading their input.
    number_E = torch.arange(choice_NE.shape[1], device=choice_NE.device)
    indices = []
    for _ in range(k):
        best_N1 = choice_NE.argmax(dim=-1, keepdim=True)
        choice_NE = choice_NE.masked_fill(number_E == best_N1, float("-inf"))
        indices.append(best_N1)
    return torch.cat(indices, dim=-1)


class Dispatched(NamedTuple):
    """The routed slots (token, expert) of this process's experts."""

    x_MD: torch.Tensor
    """Tokens sorted by expert, in the number format of the matrix multiplications."""
    counts_E: torch.Tensor
    """Number of slots of each expert in this process."""
    load_E: torch.Tensor
    """Number of slots of each expert of the layer that come from this process's tokens."""
    permutation: Any
    """The order of the slots, which `combine` needs."""


class LocalDispatcher:
    """Permutes tokens into the order of their experts on this device, and permutes the results back.

    The order of the slots is deterministic. Expert parallelism replaces this class by a dispatcher with the same two
    methods.
    """

    def dispatch(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, n_experts: int) -> Dispatched:
        """Return the tokens sorted by expert, and the permutation that sorts them."""
        experts_M = experts_NK.flatten()
        # int16, because the time of a GPU's radix sort is proportional to the size of the key.
        sorted_M, order_M = experts_M.to(torch.int16).sort(stable=True)
        # Not bincount, because it reads the maximum on the host, which would wait for the GPU in every layer.
        all_E = torch.arange(n_experts, dtype=sorted_M.dtype, device=sorted_M.device)
        counts_E = torch.searchsorted(sorted_M, all_E, right=True).diff(prepend=experts_M.new_zeros(1))
        x_MD = permute(x_ND, order_M, experts_NK.shape[1], product_type(x_ND))
        return Dispatched(x_MD, counts_E, counts_E, order_M)

    def combine(self, y_MD: torch.Tensor, permutation: Any, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the expert outputs of each token [N, D], in the dtype of `y_MD`."""
        return unpermute(y_MD, permutation, weights_NK)


class Experts(nn.Module):
    """The routed experts, stacked. For SwiGLU, `gate_up_proj` has first the gate's rows, then the up-projection's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, size = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gated, self.top_k = config.mlp_gated, config.num_experts_per_tok
        if self.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * size, D))
        else:
            self.up_proj = nn.Parameter(torch.empty(E, size, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, size))
        self.up_bias = nn.Parameter(torch.zeros(E, size)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.zeros(E, D)) if config.mlp_bias else None

    def forward(
        self, x_MD: torch.Tensor, counts_E: torch.Tensor, accumulate: bool = False, padded: bool = True
    ) -> torch.Tensor:
        """Apply the experts to the slots `x_MD`, which are sorted by expert, and return their results [M, D].

        Expert e has `counts_E[e]` slots. `accumulate` and `padded` are passed to `grouped_experts`.
        """
        up_proj = self.gate_up_proj if self.gated else self.up_proj
        weights = Weights(expanded(up_proj), expanded(self.down_proj), self.up_bias, self.down_bias)
        padded = padded and x_MD.shape[0] > self.top_k  # a single token needs no padding
        return grouped_experts(x_MD, counts_E, weights, gated=self.gated, padded=padded, accumulate=accumulate)


class Load(NamedTuple):
    """How one forward pass distributes its tokens over the experts of a layer."""

    counts_E: torch.Tensor
    """Number of routed slots (token, expert) of each expert."""
    balance: torch.Tensor
    """Sequence-wise balance loss before it is multiplied by alpha, a scalar (equations 17-20)."""


class MoE(nn.Module):
    """Routed experts weighted by the router, plus the shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts: MLP | None = None
        if config.mlp_gated:
            # As in transformers, a model without shared experts has empty matrices here.
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.n_shared_experts = config.n_shared_experts
        self.dispatcher = LocalDispatcher()

    def forward(self, x_BTD: torch.Tensor, accumulate: bool = False) -> tuple[torch.Tensor, Load]:
        """Return the layer's output [B, T, D] and its load; `accumulate` is passed to `grouped_experts`.

        The load is returned and not stored, so that recomputation and evaluation cannot count a token twice.
        """
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        n_experts = routing.scores_NE.shape[1]
        x_MD, counts_E, load_E, permutation = self.dispatcher.dispatch(x_ND, routing.experts_NK, n_experts)
        # A prompt (several tokens in inference mode) is read only once, so it needs no padding. Compiled code is for
        # training, and dynamo cannot trace `is_inference_mode_enabled`.
        padded = torch.compiler.is_compiling() or T == 1 or not torch.is_inference_mode_enabled()
        y_MD = self.experts(x_MD, counts_E, accumulate, padded)
        y_BTD = self.dispatcher.combine(y_MD, permutation, routing.weights_NK).view(B, T, -1)
        if self.n_shared_experts:
            assert self.shared_experts is not None
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        balance = sequence_balance(routing, B) if torch.is_grad_enabled() else routing.scores_NE.new_zeros(())
        return y_BTD, Load(load_E.detach(), balance)


def sequence_balance(routing: Routing, batch: int) -> torch.Tensor:
    """Return the sequence-wise balance loss (DeepSeek-V3, equations 17-20), which is 1 if the load is balanced.

    The loss of a sequence is the sum over the experts i of f_i P_i. f_i is E / (K T) times the number of tokens of
    expert i. P_i is the mean over the tokens of the normalised score of expert i, where the normalised scores of a
    token sum to 1.
    """
    scores_BTE = routing.scores_NE.unflatten(0, (batch, -1))
    experts_BX = routing.experts_NK.unflatten(0, (batch, -1)).flatten(1)
    E = scores_BTE.shape[-1]
    ones = torch.ones_like(experts_BX, dtype=scores_BTE.dtype)
    f_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add(1, experts_BX, ones) * (E / experts_BX.shape[1])
    p_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()
