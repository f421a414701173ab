"""The cross-entropy of logits in PyTorch. Shapes: R tokens, V vocab_size."""

import torch


def cross_entropy(
    logits_RV: torch.Tensor, targets_R: torch.Tensor, factor: float | torch.Tensor, z_loss: float, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses [R] and the log-sum-exps of the logits [R], in float32.

    If `differentiate` is set, the logits are overwritten with `factor` times the gradient of loss + z_loss * log_sum^2.
    """
    targets_R1 = targets_R[:, None]
    top_R1 = logits_RV.amax(dim=1, keepdim=True).float()
    target_R1 = logits_RV.gather(1, targets_R1)
    e_RV = logits_RV.to(torch.float32, copy=True).sub_(top_R1).exp_()
    sum_R1 = e_RV.sum(dim=1, keepdim=True)
    log_z_R1 = sum_R1.log() + top_R1
    if z_loss:
        e_RV.mul_(1 + 2 * z_loss * log_z_R1)
    if differentiate:
        e_RV.scatter_add_(1, targets_R1, -sum_R1)
        logits_RV.copy_(e_RV.mul_(factor / sum_R1))
    return (log_z_R1 - target_R1)[:, 0], log_z_R1[:, 0]
