"""Measures smolseek's times by number of experts and by sequence length, for the last part of bench/train_step.py."""

import statistics
from dataclasses import replace

import torch
from machine import seconds

from smolseek.model.moe import Experts
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.train.device import autocast
from smolseek.train.loss import losses

TOKENS = 1024


def layer_times(device: str, precision: str) -> dict:
    """Return the seconds of a layer with 4 to 32 experts at equal active parameters, and with a skewed router."""

    def one(n_experts: int, top_k: int, skew: bool):
        config = replace(
            preset("deepseek_159m"),
            n_routed_experts=n_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=3072 // top_k,
        )
        experts = Experts(config).to(device)
        for p in experts.parameters():
            torch.nn.init.normal_(p, std=0.02)
        slots = TOKENS * top_k
        counts = torch.full((n_experts,), slots // n_experts)
        if skew:  # nine tenths of the slots go to one expert
            counts = torch.full((n_experts,), slots // 10 // (n_experts - 1))
            counts[0] += slots - int(counts.sum())
        x = torch.randn(slots, config.hidden_size, device=device).requires_grad_()

        def run():
            with autocast(precision, torch.device(device)):
                y = experts(x, counts.to(device), accumulate=True)  # as in the training loop
            y.sum().backward()
            experts.zero_grad()

        return run

    # Layers of 4, 8, 16 or 32 experts with the same number of active neurons and of total neurons.
    runs = {n: one(n, n // 4, False) for n in (4, 8, 16, 32)} | {"even": one(16, 1, False), "skewed": one(16, 1, True)}
    times: dict = {name: [] for name in runs}
    for _ in range(12):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {str(name): statistics.median(values[3:]) for name, values in times.items()}
    return {
        "seconds": medians,
        "experts_4_to_32": medians["32"] / medians["4"],
        "nine_tenths_to_one": medians["skewed"] / medians["even"],
    }


def sequence_times(device: str, precision: str) -> dict:
    """Return the seconds of a micro-batch of 2,048 tokens as 8 x 256 and as 1 x 2,048."""
    model = new_model(preset("deepseek_159m"), device=device)
    times: dict[int, list[float]] = {256: [], 2048: []}
    for _ in range(5):
        for length, values in times.items():
            sequences = torch.randint(49_152, (2048 // length, length + 1), device=device)

            def run(sequences=sequences):
                with autocast(precision, torch.device(device)):
                    out = losses(model, sequences, accumulate=True)
                out.total.backward()
                model.zero_grad()

            values.append(seconds(run))
    medians = {length: statistics.median(values[1:]) for length, values in times.items()}
    return {"seconds": medians, "sequence_256_to_2048": medians[2048] / medians[256]}
