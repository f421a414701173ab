"""Computes the losses of a chunk, and overwrites its logits with their gradient.

Shapes: see __init__.py; R tokens that are computed at a time.
"""

import torch

from smolseek.ops.backend import c_supports, call, triton_supports
from smolseek.ops.cross_entropy import reference
from smolseek.ops.cross_entropy.chunks import CHUNK, tokens_at_once


class CrossEntropy:
    """The cross-entropy of the next token, plus `z_loss` times log^2 Z, where Z is the sum in the softmax."""

    def __init__(self, targets_N: torch.Tensor, z_loss: float, scale: torch.Tensor | None = None) -> None:
        self.targets_N, self.z_loss, self.scale = targets_N.contiguous(), z_loss, scale
        self.loss, self.squares = _zeros(targets_N)

    def add(self, logits_CV: torch.Tensor, begin: int, differentiate: bool) -> None:
        """Add the losses of a chunk that starts at token `begin`.

        The gradient of the logits is (softmax - one-hot) / N, times the scale.
        """
        targets_C = self.targets_N[begin : begin + len(logits_CV)]
        factor, options = 1 / len(self.targets_N), (self.z_loss, differentiate)
        if not self.z_loss and self.scale is None and c_supports(logits_CV):
            losses_C = logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
            inputs = logits_CV, targets_C, *logits_CV.shape, factor, losses_C, logits_CV if differentiate else None
            call("cross_entropy", *inputs, logits_CV.dtype == torch.bfloat16)
            results = [(losses_C, losses_C)]
        elif triton_supports(logits_CV):
            from smolseek.ops.cross_entropy import triton

            results = [triton.cross_entropy(logits_CV, targets_C, factor, *options, self.scale)]
        else:
            scaled = factor if self.scale is None else factor * self.scale
            chunks = (x.split(tokens_at_once(logits_CV.device)) for x in (logits_CV, targets_C))
            results = [reference.cross_entropy(x_RV, t_R, scaled, *options) for x_RV, t_R in zip(*chunks, strict=True)]
        self.loss += torch.stack([losses.sum() for losses, _ in results]).sum()
        if self.z_loss:
            for _, log_sums in results:
                self.squares += log_sums.square().sum()

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means over all tokens: the objective, and the next token's cross-entropy."""
        N = len(self.targets_N)
        return (self.loss + self.z_loss * self.squares) / N, self.loss / N


class Divergence:
    """KL(p || q) of the teacher's p = softmax(teacher_ND teacher_VD^T) and the model's q, and the cross-entropy."""

    def __init__(
        self,
        teacher_ND: torch.Tensor,
        teacher_VD: torch.Tensor,
        targets_N: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> None:
        self.teacher_ND, self.teacher_VD, self.targets_N, self.scale = teacher_ND, teacher_VD, targets_N, scale
        self.kl, self.loss = _zeros(targets_N)
        # Allocated once for all chunks, because new memory pages would take longer than the arithmetic.
        N, V = len(targets_N), len(teacher_VD)
        self.teacher_CV = teacher_ND.new_empty(min(N, CHUNK), V)
        R = min(N, tokens_at_once(targets_N.device))
        self.buffers = [teacher_ND.new_empty(R, V, dtype=torch.float32) for _ in range(3)]

    def add(self, logits_CV: torch.Tensor, begin: int, differentiate: bool) -> None:
        """Add the divergence of a chunk that starts at token `begin`.

        The gradient of the logits is (q - p) / N, times the scale.
        """
        end, share = begin + len(logits_CV), 1 / len(self.targets_N)
        teacher_CV = torch.mm(self.teacher_ND[begin:end], self.teacher_VD.T, out=self.teacher_CV[: len(logits_CV)])
        chunks = (x.split(len(self.buffers[0])) for x in (logits_CV, teacher_CV, self.targets_N[begin:end]))
        for ours_RV, theirs_RV, targets_R in zip(*chunks, strict=True):
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
            if differentiate:
                ours_RV.copy_(q.div_(sum_q).sub_(p).mul_(share if self.scale is None else share * self.scale))

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means over all tokens: the objective, and the next token's cross-entropy."""
        return self.kl / len(self.targets_N), self.loss / len(self.targets_N)


def _zeros(like: torch.Tensor) -> list[torch.Tensor]:
    return [torch.zeros((), dtype=torch.float32, device=like.device) for _ in range(2)]
