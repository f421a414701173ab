"""What a model is worth on text that it was not trained on."""

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
    rows: torch.Tensor,
    text_bytes: int,
    batch_size: int,
    context: object,
    stopped: Callable[[], object] = lambda: None,
    objective: Callable[[CausalLM, torch.Tensor], Losses] = losses,
    distributed: SingleProcess | None = None,
) -> dict[str, Any] | None:
    """Return validation loss, perplexity, bits per byte and, with experts, global MaxVio over `rows` [N, T+1].

    With a teacher's `objective` also the divergence from it. None if `stopped` became true on the way. Each process of
    `distributed` computes its share of the rows; all get the whole record.
    """
    distributed = distributed or SingleProcess()
    nats, kl, load_LE = 0.0, None, None
    device = model.lm_head.weight.device
    with context:  # type: ignore[attr-defined]
        for batch in rows.split(batch_size):
            if stopped():
                return None
            mine, share = distributed.shard_batch(batch)
            out = objective(model, mine.to(device))
            nats += float(out.next_token) * batch[:, 1:].numel() * share
            if out.kl is not None:
                kl = (kl or 0.0) + float(out.kl) * batch[:, 1:].numel()
            load = out.load_LE if share else torch.zeros_like(out.load_LE)
            load_LE = load if load_LE is None else load_LE + load
    nats = float(distributed.all_reduce(torch.tensor(nats, dtype=torch.float64)))
    load_LE = None if load_LE is None else distributed.all_reduce(load_LE)
    loss = nats / rows[:, 1:].numel()
    record: dict[str, Any] = {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_bits_per_byte": nats / math.log(2) / text_bytes,
        "val_tokens": rows[:, 1:].numel(),
    }
    if kl is not None:
        record["val_kl"] = kl / rows[:, 1:].numel()
    if load_LE is not None and load_LE.numel():
        per_layer = maxvio(load_LE)
        record |= {"val_maxvio": float(per_layer.mean()), "val_maxvio_layers": per_layer.tolist()}
        record["val_load"] = load_LE.tolist()
    return record
