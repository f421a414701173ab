"""The cost of a distributed run per process, from formulas: its memory, and the bytes that each collective sends.

The formulas assume ring algorithms and the sharding of `distributed/`. Weights are sharded over S processes and have R
replicas, experts are sharded over M processes, and a step has A micro-batches. For n bytes of float32 weights, a
process sends:

    all-gather      2 A n (S-1)/S   before the forward and before the backward pass; 1 A n for embedding and head
    reduce-scatter    A n (S-1)/S   of the gradients
    all-reduce      2 n/S (R-1)/R   over the replicas, once a step
    all-to-all      4 A p (M-1)/M   p bytes of routed slots, for each layer with experts: sent and returned, twice

`bench/scale.py` compares these formulas with measurements of small runs.
"""

from collections.abc import Iterator

import torch

from smolseek.config import ModelConfig
from smolseek.distributed.mesh import Mesh
from smolseek.model import summary
from smolseek.model.transformer import CausalLM
from smolseek.train.footprint import Run, activation_bytes, moments

INTERCONNECTS = {"nvlink": 450e9, "infiniband": 50e9, "ethernet": 12.5e9}
"""Bytes per second that one GPU can send over an H100's NVLink (900 GB/s both ways), InfiniBand NDR, 100 Gb/s
Ethernet."""
FLOPS = 0.4 * 989e12
"""Assumed operations per second: 40 % of an H100's dense bfloat16 peak (989 TFLOP/s in its data sheet)."""


def shard_cost(config: ModelConfig, mesh: Mesh, run: Run) -> tuple[int, dict[str, int]]:
    """Return the number of parameters in the largest shard of `mesh`, and the bytes that its process sends per step.

    The bytes are listed by collective. The first process has the largest shard. `run.batch_size` counts the sequences
    of all processes.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    A, M = run.grad_accum, mesh.expert
    parameters, sent = 0, {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0, "all-to-all": 0.0}
    for name, shard, shards, replicas in _shards(model, mesh):
        parameters += shard
        gathers = 2 if name.startswith("model.layers.") else 1
        sent["all-gather"] += gathers * A * 4 * shard * (shards - 1)
        sent["reduce-scatter"] += A * 4 * shard * (shards - 1)
        sent["all-reduce"] += 2 * 4 * shard * (replicas - 1) / replicas
    if M > 1:
        slots = run.batch_size * run.seq_len / mesh.size * config.num_experts_per_tok
        exchanges = 6 if run.grad_checkpointing == "full" else 4
        slot_bytes = config.hidden_size * run.bytes_per_number
        sent["all-to-all"] = config.n_moe_layers * A * exchanges * slots * slot_bytes * (M - 1) / M
    return parameters, {name: round(n) for name, n in sent.items()}


def _shards(model: CausalLM, mesh: Mesh) -> Iterator[tuple[str, int, int, int]]:
    """Yield, for each parameter, its name, the numbers in its largest shard, and the counts of shards and replicas."""
    for name, p in model.named_parameters():
        if p.numel() == 0:
            continue
        length, shards, replicas = len(p), mesh.shard, mesh.replicas
        if mesh.expert > 1 and ".mlp.experts." in name:
            length, shards, replicas = len(p) // mesh.expert, mesh.expert_shard, mesh.expert_replicas
        yield name, -(-length // shards) * p[0].numel(), shards, replicas


def lines(config: ModelConfig, mesh: Mesh, run: Run, interconnect: str) -> list[str]:
    """Return the cost as text; the share of communication assumes no overlap with computation."""
    text, bandwidth = summary.size_text, INTERCONNECTS[interconnect]
    parameters, sent = shard_cost(config, mesh, run)
    with torch.device("meta"):
        model = CausalLM(config)
    tokens = run.batch_size * run.seq_len / mesh.size
    computing = 3 * summary.flops_per_token(config, run.seq_len) * tokens * run.grad_accum / FLOPS
    sending = sum(sent.values()) / bandwidth
    numbers = moments(model, run.optimizer)
    figures = {
        "parameters": f"{parameters:,} ({text(4 * parameters)} in float32)",
        "gradients": text(4 * parameters),
        "optimizer": text(4 * sum(numbers[name] * shard for name, shard, _, _ in _shards(model, mesh))),
        "activations": text(tokens * activation_bytes(model, run)),
        "cache": f"{text(2 * config.num_hidden_layers * config.cache_features)} a token",
        **{name: f"{text(n)} sent a step" for name, n in sent.items() if n},
        "communication": f"{sending / (sending + computing):.0%} of a step over {interconnect} ({text(bandwidth)}/s), "
        f"none of it hidden behind {FLOPS / 1e12:.0f} TFLOP/s",
    }
    head = f"Each of {mesh}, {run.batch_size} x {run.seq_len} tokens a pass and {run.grad_accum} passes a step:"
    return [head, *(f"  {name:16}{figure}" for name, figure in figures.items())]
