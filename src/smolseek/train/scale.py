"""What a run costs each of many processes, on paper: memory, and bytes sent by each collective.

The formulas are those of ring algorithms and of what `distributed/` does: S processes that weights are sharded over,
R replicas, M processes that hold all experts together, A forward passes a step. For n bytes of weights in float32

    all-gather      2 A n (S-1)/S   before the forward and before the backward pass; 1 A n for embedding and head
    reduce-scatter    A n (S-1)/S   of the gradients
    all-reduce      2 n/S (R-1)/R   over the replicas, once a step
    all-to-all      4 A p (M-1)/M   p bytes of routed slots, in a layer with experts: there and back, twice

`bench/scale.py` counts them in small runs.
"""

from dataclasses import dataclass

import torch

from smolseek.config import ModelConfig
from smolseek.distributed.mesh import Mesh
from smolseek.model import summary
from smolseek.model.transformer import CausalLM
from smolseek.train.footprint import Run, attention_half, feed_half

INTERCONNECTS = {"nvlink": 450e9, "infiniband": 50e9, "ethernet": 12.5e9}
"""Bytes a second that one GPU sends: NVLink of an H100 (900 GB/s both ways), InfiniBand NDR and 100 Gb/s Ethernet."""
FLOPS = 0.4 * 989e12
"""Operations a second: 40 % of an H100's dense bfloat16 peak (989 TFLOP/s in its data sheet)."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one process holds and sends. Bytes, but for `parameters`."""

    parameters: int
    optimizer: int
    activations: int
    cache: int
    """Of one token, in bfloat16; a sequence lies on one device."""
    sent: dict[str, int]
    """In a step, by collective."""
    flops: float
    """Floating point operations of a step."""


def cost(config: ModelConfig, mesh: Mesh, run: Run) -> Cost:
    """Return what the first process of `mesh`, which holds no less than any other, holds and sends.

    `run.batch_size` counts the sequences of all processes.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    A, M = run.grad_accum, mesh.expert
    held = 0
    sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0, "all-to-all": 0.0}
    for name, p in model.named_parameters():
        if p.numel() == 0:
            continue
        rows, shards, replicas = len(p), mesh.shard, mesh.replicas
        if M > 1 and ".mlp.experts." in name:
            rows, shards, replicas = len(p) // M, mesh.expert_shard, mesh.expert_replicas
        shard = -(-rows // shards) * p[0].numel()
        held += shard
        gathers = 2 if name.startswith("model.layers.") else 1
        sent["all-gather"] += gathers * A * 4 * shard * (shards - 1)
        sent["reduce-scatter"] += A * 4 * shard * (shards - 1)
        sent["all-reduce"] += 2 * 4 * shard * (replicas - 1) / replicas
    tokens = run.batch_size * run.seq_len / mesh.size
    if M > 1:
        slots = tokens * config.num_experts_per_tok * config.hidden_size * run.number
        again = 6 if run.grad_checkpointing == "full" else 4
        sent["all-to-all"] = config.n_moe_layers * A * again * slots * (M - 1) / M
    kept = sum(
        half.whole
        for layer in range(config.num_hidden_layers)
        for half in (attention_half(config, run), feed_half(config, run, layer))
    )
    if run.grad_checkpointing == "full":
        kept = 4 * config.hidden_size * config.num_hidden_layers
    return Cost(
        parameters=held,
        optimizer=8 * held,
        activations=round(kept * tokens),
        cache=summary.cache_bytes(config).get("MLA") or 2 * config.num_hidden_layers * config.cache_features,
        sent={name: round(n) for name, n in sent.items()},
        flops=3 * summary.flops_per_token(config, run.seq_len) * tokens * A,
    )


def lines(config: ModelConfig, mesh: Mesh, run: Run, interconnect: str) -> list[str]:
    """Return the cost as text; the share of communication holds if nothing is computed meanwhile."""
    c, text = cost(config, mesh, run), summary.size_text
    bandwidth = INTERCONNECTS[interconnect]
    sending, computing = sum(c.sent.values()) / bandwidth, c.flops / FLOPS
    figures = {
        "parameters": f"{c.parameters:,} ({text(4 * c.parameters)} in float32)",
        "gradients": text(4 * c.parameters),
        "optimizer": text(c.optimizer),
        "activations": text(c.activations),
        "cache": f"{text(c.cache)} a token",
        **{name: f"{text(n)} sent a step" for name, n in c.sent.items() if n},
        "communication": f"{sending / (sending + computing):.0%} of a step over {interconnect} ({text(bandwidth)}/s), "
        f"none of it hidden behind {FLOPS / 1e12:.0f} TFLOP/s",
    }
    head = f"Each of {mesh}, {run.batch_size} x {run.seq_len} tokens a pass and {run.grad_accum} passes a step:"
    return [head, *(f"  {name:16}{figure}" for name, figure in figures.items())]
