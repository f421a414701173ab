"""The log line is the original experiment's, extended at the end."""

import torch

from smolseek.train.logging import train_line, validation_line

RECORD = {
    "step": 100,
    "loss": 9.13512,
    "lr": 2.5e-4,
    "tokens": 409_600,
    "tokens_per_second": 5726.734,
    "grad_norm": 1.0,
    "memory": 2443 * 2**20,
    "peak_memory": 3478 * 2**20,
    "maxvio": 0.2504,
}


def test_training_line():
    line = train_line(RECORD, 10_000, 71.52, torch.device("cuda"))
    assert line == (
        "Step   100/10000 (1.0%) | Loss: 9.1351 | Time: 71.5s | Tokens/sec: 5726.73 | Total Tokens: 409,600 | "
        "GPU Memory: 2443MB/3478MB | LR: 2.50e-04 | MaxVio: 0.250 | Grad norm: 1.00"
    )
    dense = {key: value for key, value in RECORD.items() if key != "maxvio"}
    assert " | Memory: 2443MB/3478MB | LR: 2.50e-04 | Grad" in train_line(dense, 10_000, 71.52, torch.device("cpu"))


def test_validation_line():
    record = {"step": 5, "val_loss": 2.0, "val_perplexity": 7.389, "val_bits_per_byte": 0.7, "val_maxvio": 0.04}
    assert validation_line(record) == (
        "Validation at step 5 | Loss: 2.0000 | Perplexity: 7.39 | Bits/byte: 0.7000 | MaxVio (global): 0.040"
    )
