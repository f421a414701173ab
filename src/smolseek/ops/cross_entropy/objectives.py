"""What becomes of a chunk's logits: its losses, and the logits' gradient in their place.

Letters as in this package's docstring, and R tokens that PyTorch's operations take at one time.
"""

import torch

from smolseek.ops.backend import c_supports, call, triton_supports
from smolseek.ops.cross_entropy import reference
from smolseek.ops.cross_entropy.chunks import CHUNK, rows_of


class CrossEntropy:
    """The next token's cross-entropy, and `z_loss` times log^2 Z, Z being the softmax's sum."""

    def __init__(self, targets_N: torch.Tensor, z_loss: float, wanted: bool) -> None:
        self.targets_N, self.z_loss, self.wanted = targets_N.contiguous(), z_loss, wanted
        self.loss, self.squares = _zero(targets_N), _zero(targets_N)

    def add(self, logits_CV: torch.Tensor, begin: int) -> None:
        """Take the logits of the tokens from `begin` on; d loss / d logits = (softmax - one-hot) / N."""
        targets_C, factor = self.targets_N[begin : begin + len(logits_CV)], 1 / len(self.targets_N)
        if not self.z_loss and c_supports(logits_CV):
            losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
            d_CV = logits_CV if self.wanted else None
            given = logits_CV, targets_C, *logits_CV.shape, factor, losses_C, d_CV
            call("cross_entropy", *given, logits_CV.dtype == torch.bfloat16)
            self.loss += losses_C.sum()
            return
        if triton_supports(logits_CV):
            from smolseek.ops.cross_entropy import triton

            parts = [triton.cross_entropy(logits_CV, targets_C, factor, self.z_loss, self.wanted)]
        else:
            rows = rows_of(logits_CV.device)
            parts = [
                reference.cross_entropy(logits_RV, targets_R, factor, self.z_loss, self.wanted)
                for logits_RV, targets_R in zip(logits_CV.split(rows), targets_C.split(rows), strict=True)
            ]
        self.loss += torch.stack([losses.sum() for losses, _ in parts]).sum()
        if self.z_loss:
            for _, log_sums in parts:
                self.squares += log_sums.square().sum()

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is differentiated, and the next token's cross-entropy."""
        N = len(self.targets_N)
        return (self.loss + self.z_loss * self.squares) / N, self.loss / N


class Divergence:
    """KL(p || q) of p = softmax(taught taught_VD^T) and the model's q, and the next token's cross-entropy."""

    def __init__(self, taught_ND: torch.Tensor, taught_VD: torch.Tensor, targets_N: torch.Tensor, wanted: bool) -> None:
        self.taught_ND, self.taught_VD, self.targets_N, self.wanted = taught_ND, taught_VD, targets_N, wanted
        self.kl, self.loss = _zero(targets_N), _zero(targets_N)
        # Made once and used by every chunk: fresh pages would cost more than the arithmetic.
        N, V = len(targets_N), len(taught_VD)
        rows = rows_of(targets_N.device)
        self.taught_CV = taught_ND.new_empty(min(N, CHUNK), V)
        self.buffers = [taught_ND.new_empty(min(N, rows), V, dtype=torch.float32) for _ in range(3)]

    def add(self, logits_CV: torch.Tensor, begin: int) -> None:
        """Take the logits of the tokens from `begin` on; d KL / d logits = (q - p) / N."""
        taught_CV = self.taught_CV[: len(logits_CV)]
        torch.mm(self.taught_ND[begin : begin + len(logits_CV)], self.taught_VD.T, out=taught_CV)
        rows = len(self.buffers[0])
        targets_C = self.targets_N[begin : begin + len(logits_CV)]
        for part in zip(logits_CV.split(rows), taught_CV.split(rows), targets_C.split(rows), strict=True):
            self._add(*part)

    def _add(self, ours_RV: torch.Tensor, theirs_RV: torch.Tensor, targets_R: torch.Tensor) -> None:
        q, p, difference = (buffer[: len(ours_RV)] for buffer in self.buffers)
        q.copy_(ours_RV)
        p.copy_(theirs_RV)
        target_R1 = q.gather(1, targets_R[:, None])
        torch.sub(p, q, out=difference)
        top_q, top_p = q.amax(dim=1, keepdim=True), p.amax(dim=1, keepdim=True)
        q.sub_(top_q).exp_()
        p.sub_(top_p).exp_()
        sum_q, sum_p = q.sum(dim=1, keepdim=True), p.sum(dim=1, keepdim=True)
        log_q, log_p = sum_q.log() + top_q, sum_p.log() + top_p
        p.div_(sum_p)
        self.kl += (difference.mul_(p).sum(dim=1, keepdim=True) - log_p + log_q).sum()
        self.loss += (log_q - target_R1).sum()
        if self.wanted:
            ours_RV.copy_(q.div_(sum_q).sub_(p).mul_(1 / len(self.targets_N)))

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is differentiated, and the next token's cross-entropy."""
        return self.kl / len(self.targets_N), self.loss / len(self.targets_N)


def _zero(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.float32, device=like.device)
