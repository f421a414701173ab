"""The lines of the log fit a terminal of 80 columns."""

from smolseek.train.logging import train_line, validation_line

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
