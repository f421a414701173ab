"""Validation: loss, perplexity, bits per byte, and the balance of the experts."""

import math
from collections.abc import Callable
from typing import Any

import torch

from smolseek.distributed.single_process import SingleProcess
from smolseek.model.transformer import CausalLM
from smolseek.train.balance import maxvio
from smolseek.train.loss import Losses, losses


@torch.no_grad()
def evaluate(
    model: CausalLM,
    sequences: torch.Tensor,
    text_bytes: int,
    batch_size: int,
    context: Any,
    stopped: Callable[[], object] = lambda: None,
    objective: Callable[[CausalLM, torch.Tensor], Losses] = losses,
    distributed: SingleProcess | None = None,
) -> dict[str, Any] | None:
    """Return the validation record of `sequences` [N, T+1], whose target tokens encode `text_bytes` bytes of text.

    The record has the global MaxVio if the model has experts, and the KL divergence from the teacher if `objective` has
    a teacher. Returns None if `stopped` became true during the evaluation. The processes of `distributed` evaluate
    different sequences, and each process returns the record of all sequences.
    """
    distributed = distributed or SingleProcess()
    device, targets = model.lm_head.weight.device, sequences[:, 1:].numel()
    nats, kl, load_LE = 0.0, None, torch.zeros((), dtype=torch.int64, device=device)
    with context:
        for batch in sequences.split(batch_size):
            if stopped():
                return None
            local_batch, share = distributed.shard_batch(batch)
            out = objective(model, local_batch.to(device))
            nats += float(out.next_token) * batch[:, 1:].numel() * share
            if out.kl is not None:
                kl = (kl or 0.0) + float(out.kl) * batch[:, 1:].numel()
            load_LE = load_LE + (out.load_LE if share else torch.zeros_like(out.load_LE))
    nats = float(distributed.all_reduce(torch.tensor(nats, dtype=torch.float64)))
    load_LE = distributed.all_reduce(load_LE)
    record: dict[str, Any] = {
        "val_loss": nats / targets,
        "val_perplexity": math.exp(min(nats / targets, 700)),
        "val_bits_per_byte": nats / math.log(2) / text_bytes,
        "val_tokens": targets,
    }
    if kl is not None:
        record["val_kl"] = kl / targets
    if load_LE.numel():
        per_layer = maxvio(load_LE)
        record |= {"val_maxvio": float(per_layer.mean()), "val_maxvio_layers": per_layer.tolist()}
        record["val_load"] = load_LE.tolist()
    return record
