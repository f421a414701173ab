"""Predicts the memory of a training run before it starts.

Weights, gradients and optimizer state are exact. Activations are estimated from the sizes of the layers' matrices. The
predicted peak is within 15% of the measured peaks in docs/results/memory.json (`python bench/memory.py --part runs`).
"""

from dataclasses import dataclass
from typing import Any

import torch

from smolseek.config import ModelConfig, OptimConfig
from smolseek.device import Precision, capability, cuda_capability
from smolseek.model.recompute import Checkpointing
from smolseek.model.summary import size_text
from smolseek.model.transformer import CausalLM
from smolseek.ops.cross_entropy import logits_bytes
from smolseek.train.optim import parameter_groups

PROGRAM = 380_000_000
"""Resident memory of a process before its model is built (measured): Python, torch, tokenizer and built-in text."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings that determine the memory of a run, apart from the model."""

    batch_size: int = 4
    grad_accum: int = 1
    seq_len: int = 256
    grad_checkpointing: Checkpointing = "none"
    precision: Precision = "bfloat16"
    """Number format of matrix multiplications."""
    optimizer: str = OptimConfig.kind
    cuda: bool = False

    @classmethod
    def planned(cls, *, precision: str, device: str, **options: Any) -> "Run":
        """Return the run that `smolseek train` would start on this machine with these options. No GPU is needed for
        `--device cuda`."""
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            can = cuda_capability((8, 0), bfloat16=True)
        else:
            can = capability(torch.device("cuda" if cuda else device if device != "auto" else "cpu"))
        return cls(precision=can.precision(precision), cuda=cuda, **options)

    @property
    def bytes_per_number(self) -> int:
        """Bytes per number in the inputs and outputs of matrix multiplications."""
        return 4 if self.precision == "float32" else 2


def lines(config: ModelConfig, run: Run) -> list[str]:
    """Return the footprint as text."""
    sizes = footprint(config, run)
    how = f"recomputation {run.grad_checkpointing}, {run.precision}, {run.optimizer}"
    head = f"Memory to train at {run.batch_size} x {run.seq_len} tokens, {run.grad_accum} a step, {how}"
    return [
        f"{head}: {size_text(sum(sizes.values()))} at the peak",
        *(f"  {name:16}{size_text(size):>10}" for name, size in sizes.items()),
    ]


def footprint(config: ModelConfig, run: Run) -> dict[str, int]:
    """Return the bytes of each kind of memory at the peak of a training run; their sum is the peak memory.

    Peak memory means the memory that PyTorch reserves on a GPU, or the resident memory of the process on a CPU.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    size, tokens = sum(p.numel() for p in model.parameters()), run.batch_size * run.seq_len
    numbers = moments(model, run.optimizer)
    logits = logits_bytes(tokens, config.vocab_size, number_bytes=run.bytes_per_number, cuda=run.cuda)
    head = logits + 4 * config.vocab_size * config.hidden_size  # plus the head's gradient before it is added
    sizes = {
        "weights": 4 * size + sum(b.numel() * b.element_size() for b in model.buffers()),
        "gradients": 4 * size,
        "optimizer": 4 * sum(numbers[name] * p.numel() for name, p in model.named_parameters() if name in numbers),
        "activations": tokens * activation_bytes(model, run),
        "head": head,
    }
    if run.cuda:
        # A CUDA graph keeps its memory, so later micro-batches and the evaluation need memory of their own.
        sizes["gradients"] *= 2 if run.grad_accum > 1 else 1
        return sizes | {"evaluation": logits}
    # malloc rarely reuses the memory of the previous step for the head's buffers.
    return sizes | {"fragmentation": head, "checkpoint copy": sizes["weights"] + sizes["optimizer"], "program": PROGRAM}


def moments(model: CausalLM, optimizer: str) -> dict[str, int]:
    """Return how many numbers the optimizer stores for each weight, by parameter: one with Muon, two with AdamW."""
    groups = parameter_groups(model, OptimConfig(kind=optimizer))  # type: ignore[arg-type]
    return {name: 1 if group.get("matrices") else 2 for group in groups for name in group["names"]}


def activation_bytes(model: CausalLM, run: Run) -> int:
    """Return the bytes per token that the layers of `model` (on any device) keep for the backward pass.

    Every matrix multiplication keeps its input and its output, with `run.bytes_per_number` bytes per number. The
    attention half and the MLP half of a layer each keep the residual stream in float32. On a CPU under autocast, each
    half keeps the normalized stream as well.
    """
    config = model.config
    stream = 2 * 4 * config.hidden_size
    layers = []
    for layer in model.model.layers:
        layers.append(stream * (2 if run.bytes_per_number == 2 and not run.cuda else 1))
        for name, p in layer.named_parameters():
            if p.ndim > 1 and p.numel() and not name.endswith("_bias"):
                slots = config.num_experts_per_tok if ".experts." in name else 1
                layers[-1] += slots * sum(p.shape[-2:]) * run.bytes_per_number
    match run.grad_checkpointing:
        case "none":
            return sum(layers)
        case "selective":  # measured: about half of all layers, and of the recomputed one
            return (sum(layers) + max(layers)) // 2
        case "full":
            return len(layers) * stream // 2 + max(layers)
