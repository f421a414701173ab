"""How much memory a training run will take, predicted before it starts.

Weights, gradients and optimizer state are exact. Activations are estimated from the sizes of the layers' matrices. The
sum of all parts is within 15% of the peaks in docs/results/memory.json (`python bench/memory.py --part runs`).
"""

from dataclasses import dataclass
from typing import Any

import torch

from smolseek.config import ModelConfig, OptimConfig
from smolseek.model.recompute import Checkpointing
from smolseek.model.summary import size_text
from smolseek.model.transformer import CausalLM
from smolseek.ops.cross_entropy import logits_bytes
from smolseek.train.device import autocast
from smolseek.train.optim import parameter_groups

PROGRAM = 380_000_000
"""Resident memory of a process before its model is built: Python, torch, tokenizer and built-in text. Measured."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the memory of a run, beside the model."""

    batch_size: int = 4
    grad_accum: int = 1
    seq_len: int = 256
    grad_checkpointing: Checkpointing = "none"
    bfloat16: bool = True
    """Whether products are computed in bfloat16, under autocast."""
    optimizer: str = "adamw"
    cuda: bool = False

    @classmethod
    def planned(cls, *, precision: str, device: str, **options: Any) -> "Run":
        """Return the run that `smolseek train` makes of these options on this machine; it need not have the GPU."""
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            bfloat16 = precision != "float32"
        else:
            bfloat16 = isinstance(autocast(precision, torch.device("cuda" if cuda else "cpu")), torch.autocast)
        return cls(bfloat16=bfloat16, cuda=cuda, **options)

    @property
    def bytes_per_number(self) -> int:
        """Bytes of a number that a product reads or writes."""
        return 2 if self.bfloat16 else 4


def lines(config: ModelConfig, run: Run) -> list[str]:
    """Return the footprint as text."""
    sizes = footprint(config, run)
    how = f"recomputation {run.grad_checkpointing}, {'bfloat16' if run.bfloat16 else 'float32'}, {run.optimizer}"
    head = f"Memory to train at {run.batch_size} x {run.seq_len} tokens, {run.grad_accum} a step, {how}"
    return [
        f"{head}: {size_text(sum(sizes.values()))} at the peak",
        *(f"  {name:16}{size_text(size):>10}" for name, size in sizes.items()),
    ]


def footprint(config: ModelConfig, run: Run) -> dict[str, int]:
    """Return the bytes of each part at the peak of a training run; their sum is the peak.

    On a GPU that is the memory which PyTorch reserves, on a CPU the resident memory of the process.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    size, tokens = sum(p.numel() for p in model.parameters()), run.batch_size * run.seq_len
    # Muon keeps one moment, and AdamW two.
    groups = parameter_groups(model, OptimConfig(kind=run.optimizer))  # type: ignore[arg-type]
    moments = sum(p.numel() * (1 if group.get("matrices") else 2) for group in groups for p in group["params"])
    logits = logits_bytes(tokens, config.vocab_size, bfloat16=run.bfloat16, cuda=run.cuda)
    head = logits + 4 * config.vocab_size * config.hidden_size  # and the product that becomes the head's gradient
    sizes = {
        "weights": 4 * size + sum(b.numel() * b.element_size() for b in model.buffers()),
        "gradients": 4 * size,
        "optimizer": 4 * moments,
        "activations": tokens * activation_bytes(model, run),
        "head": head,
    }
    if run.cuda:
        # A CUDA graph keeps its memory: the first micro-batch's gradients, and an evaluation gets other memory.
        sizes["gradients"] *= 2 if run.grad_accum > 1 else 1
        return sizes | {"evaluation": logits}
    # malloc rarely places the head's buffers where those of the step before were.
    return sizes | {"fragmentation": head, "checkpoint copy": sizes["weights"] + sizes["optimizer"], "program": PROGRAM}


def activation_bytes(model: CausalLM, run: Run) -> int:
    """Return the bytes for each token that the layers of `model` (on any device) keep for the backward pass.

    Every product keeps its input and its output, in the products' number format. The two halves of a layer keep the
    residual stream in float32, and on a CPU with bfloat16 products the normalized stream, too.
    """
    config = model.config
    stream = 2 * 4 * config.hidden_size
    layers = []
    for layer in model.model.layers:
        layers.append(stream * (2 if run.bfloat16 and not run.cuda else 1))
        for name, p in layer.named_parameters():
            if p.ndim > 1 and p.numel() and not name.endswith("_bias"):
                slots = config.num_experts_per_tok if ".experts." in name else 1
                layers[-1] += slots * sum(p.shape[-2:]) * run.bytes_per_number
    match run.grad_checkpointing:
        case "none":
            return sum(layers)
        case "selective":  # measured: about half, beside the layer that is computed again
            return (sum(layers) + max(layers)) // 2
        case "full":
            return len(layers) * stream // 2 + max(layers)
