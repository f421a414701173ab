"""The training objective.

Shapes: B sequences, T predicted tokens, N = B*T, C tokens of a chunk, S of a block, R of some rows, D hidden_size,
V vocab_size, L layers with experts, E routed experts.
"""

import math
from typing import Any, NamedTuple

import torch

from smolseek.model.gradients import InPlace
from smolseek.model.kernels import call, fit, on_gpu
from smolseek.model.transformer import CausalLM

# Tokens whose logits exist at one time on a CPU: 256 x 49,152 are 25 MB in bfloat16. Fewer make slower products.
_CHUNK = 256
# Logits that exist at one time on a GPU: 16,384 tokens' of 49,152 words, 1.6 GB in bfloat16. Below 8,192 tokens the
# product with the weights has too few tiles for the processor, and each chunk adds a whole gradient of the weights.
_LOGITS = 16384 * 49_152
# Tokens whose exponentials exist at one time on a CPU: 16 x 49,152 numbers in float32 are about two cores' caches.
_ROWS = 16
# Tokens whose gradients of the logits are kept, in the products' type, for one product with the hidden states: each
# product writes and adds a whole V x D, so there should be few.
_BLOCK = 4 * _CHUNK
# Words whose gradients are added at one time: PyTorch casts what it adds to another type, and first makes the cast.
_SLICE = 4096
# Words whose logits are one product, in float32 on a CPU: MKL is a fifth slower when it writes whole rows of 49,152.
_WORDS = 1024


class Losses(NamedTuple):
    """The parts of the objective for one batch, and the load that came with it."""

    total: torch.Tensor
    """What is differentiated: next_token + alpha * balance, and the z-loss."""
    next_token: torch.Tensor
    """Mean cross-entropy of the next token, in nats."""
    balance: torch.Tensor
    """Sequence-wise balance loss without its weight."""
    load_LE: torch.Tensor
    """Pairs of token and expert per layer."""
    kl: torch.Tensor | None = None
    """KL divergence from the teacher, in nats, where there is one; then it is what is differentiated."""


def losses(model: CausalLM, rows: torch.Tensor, *, alpha: float = 0.0, z_loss: float = 0.0) -> Losses:
    """Return the losses of `rows` [B, T+1]: token t+1 is predicted from tokens 0..t, nothing is masked or padded."""
    ids_BT, targets_BT = rows[:, :-1], rows[:, 1:]
    out = model.hidden(ids_BT)
    h_ND, w_VD = out.hidden_BTD.flatten(0, 1), model.lm_head.weight
    head, next_token = _head(h_ND, w_VD, targets_BT.flatten(), z_loss, model.in_place)
    total = head + alpha * out.balance if alpha else head
    return Losses(total, next_token.detach(), out.balance.detach(), out.load_LE)


def linear_cross_entropy(
    h_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, z_loss: float = 0.0
) -> torch.Tensor:
    """Return the mean cross-entropy of logits h w^T against `targets_N`, a float32 scalar.

    The logits are never held whole: each chunk of tokens gives its part of the loss and, while its logits are still
    in the processor's caches, of both gradients. Under autocast the products are in its number format, everything
    between them in float32. Added is `z_loss` times the mean of log^2 Z, Z being the softmax's sum, which keeps the
    logits from drifting (PaLM, 2204.02311, section 5).

    Raises:
        IndexError: on a CPU for a target that is no word; none is ignored.
    """
    return _head(h_ND, w_VD, targets_N, z_loss, InPlace())[0]


def _head(
    h_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, z_loss: float, in_place: InPlace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `linear_cross_entropy` and the cross-entropy alone, which is not differentiated."""
    device = h_ND.device.type
    # On CUDA to ask would make the host wait: there the loss of such a target is NaN, or an error of the device.
    if device == "cpu" and len(targets_N):
        least, most = (int(number) for number in targets_N.aminmax())
        if least < 0 or most >= len(w_VD):
            raise IndexError(f"targets {least} to {most} are not all among the {len(w_VD)} words: nothing is ignored")
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    # Asked out here: within `forward` gradients are off, and `needs_input_grad` is true without them, too.
    wanted = tuple(torch.is_grad_enabled() and t.requires_grad for t in (h_ND, w_VD))
    return _LinearCrossEntropy.apply(h_ND, w_VD, targets_N, dtype, z_loss, in_place, wanted)


def _sizes(vocab: int, cuda: bool, wanted: bool = True) -> tuple[int, int]:
    """Return how many tokens a chunk and a block have."""
    if not cuda:
        return _CHUNK, _BLOCK if wanted else _CHUNK
    chunk = max(_CHUNK, 1 << (_LOGITS // vocab).bit_length() - 1)
    return chunk, chunk


class _Softmax:
    """Turns a chunk's logits into their gradients, where they are wanted, and gives the sum of its losses."""

    def __init__(self, targets_N: torch.Tensor, factor: float, wanted: bool, z_loss: float) -> None:
        self.targets_N, self.factor, self.wanted = targets_N.contiguous(), factor, wanted
        self.z_loss, self.squares = z_loss, torch.zeros((), dtype=torch.float32, device=targets_N.device)

    def __call__(self, logits_CV: torch.Tensor, begin: int) -> torch.Tensor:
        """Take the logits of the tokens from `begin` on; d loss / d logits = (softmax - one-hot) * factor."""
        targets_C = self.targets_N[begin : begin + len(logits_CV)]
        if not self.z_loss and fit(logits_CV):
            losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
            d_CV = logits_CV if self.wanted else None
            call("cross_entropy", logits_CV.dtype, logits_CV, targets_C, *logits_CV.shape, self.factor, losses_C, d_CV)
            return losses_C.sum()
        if on_gpu(logits_CV):
            from smolseek.train import softmax

            given = logits_CV, targets_C, self.factor, self.z_loss, self.wanted
            losses_C, log_sums_C = softmax.cross_entropy(*given)
            if self.z_loss:
                self.squares += log_sums_C.square().sum()
            return losses_C.sum()
        rows = _ROWS if logits_CV.device.type == "cpu" else _CHUNK
        pieces = zip(logits_CV.split(rows), targets_C[:, None].split(rows), strict=True)
        return torch.stack([self._piece(*piece) for piece in pieces]).sum()

    def _piece(self, logits_RV: torch.Tensor, targets_R1: torch.Tensor) -> torch.Tensor:
        top_R1 = logits_RV.amax(dim=1, keepdim=True).float()
        target_R1 = logits_RV.gather(1, targets_R1)
        e_RV = logits_RV.to(torch.float32, copy=True).sub_(top_R1).exp_()
        sum_R1 = e_RV.sum(dim=1, keepdim=True)
        log_z_R1 = sum_R1.log() + top_R1
        if self.z_loss:
            self.squares += log_z_R1.square().sum()
            e_RV.mul_(1 + 2 * self.z_loss * log_z_R1)
        if self.wanted:
            e_RV.scatter_add_(1, targets_R1, -sum_R1)
            logits_RV.copy_(e_RV.mul_(self.factor / sum_R1))
        return (log_z_R1 - target_R1).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        w_VD: torch.Tensor,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        z_loss: float,
        in_place: InPlace,
        wanted_of: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (h_wanted, w_wanted), wanted = wanted_of, any(wanted_of)
        ctx.weight, ctx.in_place = w_VD, in_place
        (N, _), V = h_ND.shape, w_VD.shape[0]
        # Cast in here: a gradient that left through a cast of the weight would be rounded to that cast's type.
        h_ND, w_VD = h_ND.to(dtype), w_VD.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        place = in_place.place(ctx.weight) if w_wanted and in_place.factor is not None else None
        ctx.added = None if place is None else in_place.factor
        # Made once and used by every chunk: fresh pages would cost more than the arithmetic. The logits' gradients
        # take the logits' place.
        chunk, block = _sizes(V, h_ND.is_cuda, w_wanted)
        d_SV = h_ND.new_empty(min(N, block), V)
        dh_ND, dw_VD = torch.empty_like(h_ND) if h_wanted else None, None
        softmax = _Softmax(targets_N, 1 / N, wanted, z_loss)
        with torch.autocast(h_ND.device.type, enabled=False):
            for begin in range(0, N, chunk):
                h_CD = h_ND[begin : begin + chunk]
                C, first = len(h_CD), begin % len(d_SV)
                logits_CV = _logits(h_CD, w_VD, d_SV[first : first + C])
                loss += softmax(logits_CV, begin)
                if dh_ND is not None:
                    torch.mm(logits_CV, w_VD, out=dh_ND[begin : begin + C])
                if w_wanted:
                    if begin + C == N:
                        del w_VD  # nobody reads the cast again: room for the gradient
                    if first + C == block or begin + C == N:
                        factors = d_SV[: first + C].T, h_ND[begin - first : begin + C]
                        if place is not None:
                            _add_product(place, *factors, ctx.added)
                        else:
                            part_VD = factors[0] @ factors[1]
                            dw_VD = part_VD if block >= N else _add(dw_VD, part_VD)
                            del part_VD
        if wanted:
            ctx.gradients = dh_ND, dw_VD
        next_token = loss / N
        ctx.mark_non_differentiable(next_token)
        return (loss + z_loss * softmax.squares) / N, next_token

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        # Handed over, not kept: the weight's gradient is scaled where it lies.
        assert ctx.gradients is not None, "this loss is differentiated once"
        (dh_ND, dw_VD), ctx.gradients = ctx.gradients, None
        dh_ND = None if dh_ND is None else dh_ND * grad
        if ctx.added is not None:
            factor = grad.item()
            if not math.isfinite(factor):  # the loss was not either; what was added before is lost in such a sum
                ctx.weight.grad.fill_(math.nan)
            elif not math.isclose(factor, ctx.added, rel_tol=1e-5):
                raise RuntimeError(f"the head's gradient was added times {ctx.added}, and is asked for {factor} times")
            return dh_ND, None, None, None, None, None, None
        place = ctx.in_place.place(ctx.weight) if dw_VD is not None else None
        if place is not None:
            _add(place, dw_VD, grad.item())
            return dh_ND, None, None, None, None, None, None
        return dh_ND, None if dw_VD is None else dw_VD.float().mul_(grad), None, None, None, None, None


def _logits(h_CD: torch.Tensor, w_VD: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """Write h w^T into `out_CV` and return it."""
    words = _WORDS if out_CV.device.type == "cpu" and out_CV.dtype == torch.float32 else w_VD.shape[0]
    for w_SD, out_CS in zip(w_VD.split(words), out_CV.split(words, dim=1), strict=True):
        torch.mm(h_CD, w_SD.T, out=out_CS)
    return out_CV


def _add(sum_VD: torch.Tensor | None, part_VD: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Return `sum_VD` with factor times `part_VD` added to it in place; without one the part in float32."""
    if sum_VD is None:
        return part_VD.float()
    words = _SLICE if sum_VD.device.type == "cpu" else len(sum_VD)
    for sum_SD, part_SD in zip(sum_VD.split(words), part_VD.split(words), strict=True):
        sum_SD.add_(part_SD, alpha=factor)
    return sum_VD


def _add_product(sum_VD: torch.Tensor, d_VS: torch.Tensor, h_SD: torch.Tensor, factor: float) -> None:
    """Add factor times d h to `sum_VD`: by the product itself where the types are the same."""
    if d_VS.dtype == sum_VD.dtype:
        torch.addmm(sum_VD, d_VS, h_SD, alpha=factor, out=sum_VD)
    else:
        _add(sum_VD, d_VS @ h_SD, factor)


def logits_bytes(tokens: int, vocab: int, *, bfloat16: bool) -> int:
    """Return what the logits take that exist at one time on a GPU."""
    return vocab * min(tokens, _sizes(vocab, True)[0]) * (2 if bfloat16 else 4)


def held_bytes(tokens: int, vocab: int, features: int, *, bfloat16: bool, cuda: bool, earlier: bool = False) -> int:
    """Return what `linear_cross_entropy` holds at its peak for h [tokens, features] and w [vocab, features], float32.

    The weight's gradient is among it, h itself is not. `earlier`: there is one already that it is added to in place.
    On a CPU as in a training step, which knows what the gradient will be multiplied by.
    """
    _, block = _sizes(vocab, cuda)
    a, weight, several = 2 if bfloat16 else 4, vocab * features, tokens > block
    logits = vocab * min(tokens, block) * a
    cast = weight * a if bfloat16 else 0
    hidden = tokens * features * (2 * a if bfloat16 else a)
    if cuda:
        # One block's product is the gradient; several are added in float32, all but the last while the cast is there.
        product, added = weight * a, weight * 4 if several else 0
        new = 0 if several or not bfloat16 else weight * 4  # handed over it becomes float32
        return hidden + max(
            logits + cast + added,
            logits + cast + added + product if several else 0,
            logits + added + product,
            (added or product) + new,
        )
    exponentials = 0
    if not fit(torch.empty(0, dtype=torch.bfloat16 if bfloat16 else torch.float32)):
        exponentials = vocab * min(tokens, _ROWS) * 4
    # Added to what is there, or to zeros, by a product that may be in another type: then a slice at a time.
    new = 0 if earlier else weight * 4
    product = weight * a + min(vocab, _SLICE) * features * 4 if bfloat16 else 0
    return hidden + logits + new + max(cast + exponentials, product + (cast if several else 0))
