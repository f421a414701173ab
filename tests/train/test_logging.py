"""The lines of the log fit a terminal of 80 columns."""

from dataclasses import replace

import pytest

from smolseek.config import OptimConfig, ScheduleConfig, TrainConfig
from smolseek.presets import preset
from smolseek.train.logging import recipe_lines, train_line, validation_line

RECORD = {"step": 100, "loss": 9.13512, "lr": 2.5e-4, "tokens_per_second": 5726.734, "grad_norm": 1.0, "maxvio": 0.2504}


def test_training_line():
    line = "step   100/10000  loss 9.1351  lr 2.5e-04  grad 1.00  maxvio 0.25  5,727 tok/s"
    assert train_line(RECORD, 10_000) == line and len(line) <= 80
    dense = {key: value for key, value in RECORD.items() if key != "maxvio"}
    assert train_line(dense | {"kl": 0.1}, 10_000) == (
        "step   100/10000  loss 9.1351  kl 0.1000  lr 2.5e-04  grad 1.00  5,727 tok/s"
    )


def test_validation_line():
    record = {"step": 5, "val_loss": 2.0, "val_perplexity": 7.389, "val_bits_per_byte": 0.7, "val_maxvio": 0.04}
    line = "val      5/10000  loss 2.0000  perplexity 7.39  bits/byte 0.7000  maxvio 0.04"
    assert validation_line(record, 10_000) == line and len(line) <= 80


MUON = OptimConfig(
    lr=0.06, embedding_factor=1 / 3, head_factor=0.5, vector_factor=0.25, weight_decay=0.1, head_decay=0.1
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"optim": MUON, "schedule": ScheduleConfig(warmup_steps=50, decay_fraction=1.0, final_factor=0.0)},
            "Recipe: Muon 0.06, AdamW for embedding and tied head 0.02, norms, biases and routers 0.015\n"
            "  warm-up 30 steps, linear decay to 0 over 100% of the run; weight decay 0.1",
        ),
        (
            {
                "model": replace(preset("tiny"), n_routed_experts=0, tie_word_embeddings=False),
                "optim": replace(MUON, cautious_decay=True, head_decay=0.2, embedding_decay=0.3),
                "schedule": ScheduleConfig(kind="constant", warmup_steps=5),
            },
            "Recipe: Muon 0.06, AdamW for embedding 0.02, head 0.03, norms and biases 0.015\n"
            "  warm-up 5 steps, constant learning rate; cautious weight decay 0.1, head 0.2, embedding 0.3",
        ),
        (
            {
                "optim": OptimConfig(kind="adamw", lr=2e-3, embedding_factor=3.0, vector_factor=1.0, weight_decay=0.1),
                "schedule": ScheduleConfig(kind="cosine", final_factor=0.1, warmup_steps=0),
            },
            "Recipe: AdamW 0.002, embedding and tied head 0.006\n"
            "  warm-up 0 steps, cosine decay to 10% of the peak; weight decay 0.1",
        ),
    ],
)
def test_the_recipe_of_a_run(options, expected):
    config = TrainConfig(**{"model": preset("tiny"), "run": "runs/x", "steps": 300, **options})
    assert "\n".join(recipe_lines(config)) == expected
