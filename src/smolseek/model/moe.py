"""DeepSeekMoE (2401.06066; DeepSeek-V3 2412.19437, section 2.1.2): shared and routed experts, never dropping a token.

Shapes: B batch, T tokens, N = B*T tokens, D hidden_size, E routed experts, K experts per token, F neurons of an
expert, M = N*K pairs of token and expert, sorted by expert.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from smolseek.config import ModelConfig
from smolseek.model import rows
from smolseek.model.gradients import InPlace
from smolseek.model.kernels import on_gpu


class MLP(nn.Module):
    """SwiGLU feed-forward layer (2002.05202): W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(rows.swiglu(self.gate_proj(x), self.up_proj(x)))


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    weights_NK: torch.Tensor
    """Gate weights, float32."""
    experts_NK: torch.Tensor
    """Chosen experts."""
    scores_NE: torch.Tensor
    """Sigmoid affinities without the balancing bias, float32."""


class Router(nn.Module):
    """Sigmoid router with a balancing bias that decides who is chosen, never how much it counts (equations 12-16)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """Choose K experts for each token, in float32 also under autocast."""
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
        """Shut out all but the best groups; a group counts by its two best experts (section 2.1.2)."""
        choice_NGX = choice_NE.unflatten(1, (self.groups, -1))
        group_NG = choice_NGX.topk(2, dim=-1).values.sum(dim=-1)
        best = group_NG.topk(self.top_groups, dim=-1, sorted=False).indices
        shut_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(1, best, False)
        return choice_NGX.masked_fill(shut_NG[..., None], float("-inf")).flatten(1)


def _best(choice_NE: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices of the k largest numbers of each row [N, k], in no particular order."""
    if not (on_gpu(choice_NE) and torch.compiler.is_compiling()) or k > 8:
        return choice_NE.topk(k, dim=-1, sorted=False).indices
    # CUDA's topk takes a block of threads for each row; compiled, these few reductions are as fast as reading the rows.
    number_E = torch.arange(choice_NE.shape[1], device=choice_NE.device)
    found = []
    for _ in range(k):
        best_N1 = choice_NE.argmax(dim=-1, keepdim=True)
        choice_NE = choice_NE.masked_fill(number_E == best_N1, float("-inf"))
        found.append(best_N1)
    return torch.cat(found, dim=-1)


def _product_type(x: torch.Tensor) -> torch.dtype:
    """Return the number format of products with `x`: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Dispatched(NamedTuple):
    """Pairs of token and expert, ready for the experts that are here."""

    x_MD: torch.Tensor
    """Tokens sorted by expert, in the products' type."""
    counts_E: torch.Tensor
    """Pairs of each expert that is here."""
    load_E: torch.Tensor
    """Pairs of each expert among the tokens of this process."""
    way: Any
    """For `combine`."""


class LocalDispatcher:
    """Brings each token to its experts on this device and the results back, in a fixed order.

    Expert parallelism puts another dispatcher with these two methods in its place.
    """

    def dispatch(self, x_ND: torch.Tensor, experts_NK: torch.Tensor, n_experts: int) -> Dispatched:
        """Return the tokens sorted by expert; the way back is their order."""
        experts_M = experts_NK.flatten()
        # Small keys: a GPU sorts by digits, and eight bytes have four times as many as two.
        sorted_M, order_M = experts_M.to(torch.int16).sort(stable=True)
        # Not bincount: it reads the largest number on the host, so a GPU would be waited for in every layer.
        all_E = torch.arange(n_experts, dtype=sorted_M.dtype, device=sorted_M.device)
        counts_E = torch.searchsorted(sorted_M, all_E, right=True).diff(prepend=experts_M.new_zeros(1))
        x_MD = rows.spread(x_ND, order_M, experts_NK.shape[1], _product_type(x_ND))
        return Dispatched(x_MD, counts_E, counts_E, order_M)

    def combine(self, y_MD: torch.Tensor, way: Any, weights_NK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts [N, D], in the type of `y_MD`."""
        return rows.combine(y_MD, way, weights_NK)


# An expert's products have a multiple of this many rows. oneDNN writes a program for each shape, in milliseconds
# and up to half a megabyte, and keeps a thousand of them: with the experts' own numbers of rows nearly every
# product would be a new shape. Below 12 rows its and MKL's float32 products take other kernels, which round otherwise.
_ROWS = 16


def _linear(x_XD: torch.Tensor, w_FD: torch.Tensor, b_F: torch.Tensor | None) -> torch.Tensor:
    """Return x w^T + b for a multiple of `_ROWS` rows, so never for few.

    An expert's tokens are those that chose it, so a later token changes the number of rows that an earlier one is
    computed among. Padding keeps the earlier token's result the same to the last bit.
    """
    count = x_XD.shape[0]
    return F.linear(_rows(x_XD, 0, _round_up(count)), w_FD, b_F)[:count]


def _round_up(count: int) -> int:
    return -(-count // _ROWS) * _ROWS


def _rows(x_MX: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """Return `count` rows from `begin` on; zeros beyond the last."""
    missing = begin + count - x_MX.shape[0]
    return x_MX[begin : begin + count] if missing <= 0 else F.pad(x_MX[begin:], (0, 0, 0, missing))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """Write a b into `out`, or add it there: by the product itself where the types are the same."""
    if a.dtype != out.dtype:
        out.add_(a @ b) if add else out.copy_(a @ b)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


@torch.library.custom_op("smolseek::swiglu_experts", mutates_args=())
def swiglu_experts(
    x_MD: torch.Tensor, up_EXD: torch.Tensor, down_EDF: torch.Tensor, counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' results [M, D] and their first products [M, 2F], one expert after the other.

    An operator of its own, so that selective recomputation can keep what it made (`model/recompute.py`).
    """
    M = x_MD.shape[0]
    h_MX = x_MD.new_empty(_round_up(M) + _ROWS, up_EXD.shape[1])
    y_MD = x_MD.new_empty(_round_up(M) + _ROWS, x_MD.shape[1])
    begin = 0
    for e, count in enumerate(counts):
        if count:
            # The rows beyond its own are the next expert's, who writes them anew.
            part = slice(begin, begin + _round_up(count))
            torch.mm(_rows(x_MD, begin, _round_up(count)), up_EXD[e].to(x_MD.dtype).T, out=h_MX[part])
            torch.mm(rows.stacked_swiglu(h_MX[part]), down_EDF[e].to(x_MD.dtype).T, out=y_MD[part])
        begin += count
    return y_MD[:M], h_MX[:M]


class _LoopedSwiGLU(torch.autograd.Function):
    """SwiGLU experts one after the other, each writing its weights' gradients into its own slices.

    Autograd over slices would keep every cast weight and every intermediate, and stack the experts' gradients anew.
    Here a weight is cast right before its product, while it is in the processor's cache, and only the first
    product is kept: the rest is elementwise and is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: torch.Tensor,
        up_EXD: torch.Tensor,
        down_EDF: torch.Tensor,
        counts: list[int],
        in_place: InPlace,
    ) -> torch.Tensor:
        y_MD, h_MX = swiglu_experts(x_MD, up_EXD, down_EDF, counts)
        ctx.save_for_backward(x_MD, h_MX)
        # The weights themselves: recomputation would hand back others, without a `.grad`.
        ctx.weights, ctx.counts, ctx.in_place = (up_EXD, down_EDF), counts, in_place
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x_MD, h_MX), (up_EXD, down_EDF) = ctx.saved_tensors, ctx.weights
        M, dy_MD = x_MD.shape[0], dy_MD.contiguous()
        x_wanted, up_wanted, down_wanted = ctx.needs_input_grad[:3]
        dx_MD = x_MD.new_empty(_round_up(M) + _ROWS, x_MD.shape[1]) if x_wanted else None
        up_place, down_place = ctx.in_place.place(up_EXD), ctx.in_place.place(down_EDF)
        d_up = torch.empty_like(up_EXD) if up_wanted and up_place is None else None
        d_down = torch.empty_like(down_EDF) if down_wanted and down_place is None else None
        begin = 0
        for e, count in enumerate(ctx.counts):
            if count == 0:
                for new in (d_up, d_down):
                    if new is not None:
                        new[e].zero_()
                continue
            more = _round_up(count)
            x, dy, h = (_rows(t, begin, more) for t in (x_MD, dy_MD, h_MX))
            dh, a = rows.stacked_swiglu_back(h, dy @ down_EDF[e].to(dy.dtype))
            # The rows beyond its own are the next expert's: they are to count for nothing here.
            dh[count:], a[count:] = 0, 0
            for new, place, left, right in ((d_down, down_place, dy.T, a), (d_up, up_place, dh.T, x)):
                if place is not None:
                    _product(left, right, place[e], add=True)
                elif new is not None:
                    _product(left, right, new[e])
            if dx_MD is not None:
                torch.mm(dh, up_EXD[e].to(dy.dtype), out=dx_MD[begin : begin + more])
            begin += count
        return None if dx_MD is None else dx_MD[:M], d_up, d_down, None, None


class _Rows(torch.autograd.Function):
    """b[expert], whose gradients a product adds up in a fixed order; the backward pass of an index takes atomics."""

    @staticmethod
    def forward(ctx: Any, b_EF: torch.Tensor, expert_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(expert_M)
        ctx.experts = b_EF.shape[0]
        return b_EF[expert_M]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_MF: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (expert_M,) = ctx.saved_tensors
        own_EM = (expert_M == torch.arange(ctx.experts, device=d_MF.device)[:, None]).to(d_MF.dtype)
        return own_EM @ d_MF, None


def missing(features: int, dtype: torch.dtype) -> int:
    """Return how many features a row lacks to `F.grouped_mm`, which takes only rows of whole 16 bytes."""
    return -features % (16 // dtype.itemsize)


class Experts(nn.Module):
    """The routed experts, stacked. SwiGLU: `gate_up_proj` holds the gate's rows first, then the up-projection's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, size = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gated, self.in_place = config.mlp_gated, InPlace()
        self.top_k = config.num_experts_per_tok
        if self.gated:
            self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * size, D))
        else:
            self.up_proj = nn.Parameter(torch.empty(E, size, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, size))
        self.up_bias = nn.Parameter(torch.zeros(E, size)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.zeros(E, D)) if config.mlp_bias else None

    def forward(self, x_MD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Apply expert e to its `counts_E[e]` rows of `x_MD`, which is sorted by expert -> [M, D]."""
        if x_MD.is_cuda and torch.is_autocast_enabled("cuda"):
            return self._grouped(x_MD.to(torch.get_autocast_dtype("cuda")), counts_E)
        if self.gated and not x_MD.is_cuda and torch.is_grad_enabled():
            x_MD = x_MD.to(_product_type(x_MD))
            return self._looped_in_place(x_MD, counts_E)
        return self._looped(x_MD, counts_E)

    @torch.compiler.disable  # a compiled backward pass would not see that it adds to `.grad`
    def _looped_in_place(self, x_MD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return _LoopedSwiGLU.apply(x_MD, self.gate_up_proj, self.down_proj, counts_E.tolist(), self.in_place)

    def _looped(self, x_MD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """One product per expert. `unbind` once: indexing would add a full-size gradient per expert."""
        # A single token has no earlier one whose result must stay as it is.
        linear = _linear if x_MD.shape[0] > self.top_k and not x_MD.is_cuda else F.linear
        first = self.gate_up_proj if self.gated else self.up_proj
        none = (None,) * first.shape[0]
        b_up = none if self.up_bias is None else self.up_bias.unbind()
        b_down = none if self.down_bias is None else self.down_bias.unbind()
        parts = []
        for x_XD, w_up, w_down, bu, bd in zip(
            x_MD.split(counts_E.tolist()), first.unbind(), self.down_proj.unbind(), b_up, b_down, strict=True
        ):
            if x_XD.shape[0] == 0:
                continue
            parts.append(linear(self._activate(linear(x_XD, w_up, bu)), w_down, bd))
        return torch.cat(parts) if parts else x_MD.new_empty(x_MD.shape)

    def _grouped(self, x_MD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """All experts in one grouped product each way, without the host learning the counts."""
        ends_E = counts_E.cumsum(0).to(torch.int32)
        dtype, D, size = x_MD.dtype, *self.down_proj.shape[1:]
        first = (self.gate_up_proj if self.gated else self.up_proj).to(dtype)
        last = self.down_proj.to(dtype)
        more_D, more_F = missing(D, dtype), missing(size, dtype)
        if more_D or more_F:  # features and neurons of zeros, which add nothing
            parts_EPFD = first.unflatten(1, (-1, size))
            first = F.pad(parts_EPFD, (0, more_D, 0, more_F)).flatten(1, 2)
            last, x_MD = F.pad(last, (0, more_F, 0, more_D)), F.pad(x_MD, (0, more_D))
        h = F.grouped_mm(x_MD, first.transpose(1, 2), offs=ends_E)
        if self.up_bias is None or self.down_bias is None:
            return F.grouped_mm(self._activate(h), last.transpose(1, 2), offs=ends_E)[:, :D]
        row_M1 = torch.arange(x_MD.shape[0], device=x_MD.device)[:, None]
        expert_M = (row_M1 >= ends_E).sum(dim=1)
        h = self._activate(h + _Rows.apply(F.pad(self.up_bias.to(dtype), (0, more_F)), expert_M))
        y = F.grouped_mm(h, last.transpose(1, 2), offs=ends_E)[:, :D]
        return y + _Rows.apply(self.down_bias.to(dtype), expert_M)

    def _activate(self, h: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return F.silu(h)
        return rows.activate(h)


class Load(NamedTuple):
    """How the tokens of one forward pass spread over the experts of one layer."""

    counts_E: torch.Tensor
    """Pairs of token and expert, per expert."""
    balance: torch.Tensor
    """Sequence-wise balance loss without its weight alpha, a scalar (equations 17-20)."""


class MoE(nn.Module):
    """Routed experts weighted by the router, plus the shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts: MLP | None = None
        if config.mlp_gated:
            # Without shared experts the matrices are empty but there, as transformers has them.
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.n_shared_experts = config.n_shared_experts
        self.dispatcher = LocalDispatcher()

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, Load]:
        """Return the layer's output [B, T, D] and its load.

        The load is returned rather than kept, so that recomputation in the backward pass and evaluation cannot
        count a token twice.
        """
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        n_experts = routing.scores_NE.shape[1]
        x_MD, counts_E, load_E, way = self.dispatcher.dispatch(x_ND, routing.experts_NK, n_experts)
        y_MD = self.experts(x_MD, counts_E)
        y_BTD = self.dispatcher.combine(y_MD, way, routing.weights_NK).view(B, T, -1)
        if self.n_shared_experts:
            assert self.shared_experts is not None
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        balance = sequence_balance(routing, B) if torch.is_grad_enabled() else routing.scores_NE.new_zeros(())
        return y_BTD, Load(load_E.detach(), balance)


def sequence_balance(routing: Routing, batch: int) -> torch.Tensor:
    """Return sum_i f_i P_i, averaged over the sequences (DeepSeek-V3, equations 17-20); 1 when balanced.

    f_i = E / (K T) * tokens of expert i, P_i = mean over the sequence of the scores normalised to sum 1.
    """
    scores_BTE = routing.scores_NE.unflatten(0, (batch, -1))
    experts_BX = routing.experts_NK.unflatten(0, (batch, -1)).flatten(1)
    E = scores_BTE.shape[-1]
    ones = torch.ones_like(experts_BX, dtype=scores_BTE.dtype)
    f_BE = torch.zeros_like(scores_BTE[:, 0]).scatter_add(1, experts_BX, ones) * (E / experts_BX.shape[1])
    p_BE = (scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (f_BE * p_BE).sum(dim=-1).mean()
