"""A run folder like that of a finished training, written without training."""

import json
from dataclasses import replace

from smolseek.config import TrainConfig, to_dict
from smolseek.presets import tiny


def a_run(path, *, lr=1e-3, steps=40, logged=40, experts=True):
    """Write a run folder like that of a finished training."""
    path.mkdir()
    config = TrainConfig(model=tiny(), run=str(path), steps=steps)
    config = replace(config, optim=replace(config.optim, lr=lr))
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    records = [
        {"step": 0, "date": "2026-01-01", "machine": {"cpu": "Abacus"}, "versions": {"torch": "2.13"}}
        | {"parameters": 8_000_000, "active": 7_000_000},
        {"step": 0, "audit": "start", "audit_counts": {"pass": 1, "fail": 0, "skip": 0}, "audit_findings": []},
    ]
    for step in range(10, logged + 1, 10):
        records.append(
            {"step": step, "loss": 10 - step / 10, "lr": lr, "tokens": step * 1000, "tokens_per_second": 500.0}
            | {"grad_norm": 1.0, "memory": 10**9, "peak_memory": 2 * 10**9, "maxvio": 0.5}
            | {"data": {"documents": step, "tokens": step * 1000, "bytes": 7, "retries": 0}}
        )
        record = {"step": step, "val_loss": 9.5 - step / 10, "val_perplexity": 90.0, "val_bits_per_byte": 1.5}
        if experts:
            record |= {"val_maxvio": 0.25, "val_load": [[100, 0, 50, 50]] * 4}
        records.append(record)
    records.append({"step": 20, "resumed": "step-000020"})
    records.append({"step": 30, "skipped": {"reason": "its loss is nan", "tokens": 1024, "data": {}}})
    records.append({"step": 30, "returned": {"from": 33, "undone_tokens": 3000, "data": []}})
    records.append({"step": 31, "save_failed": "the checkpoint of step 31 cannot be written"})
    records[-2]["data"] = {"retries": 2, "last_retry": "a.parquet: HTTP 429"}
    finding = {"check": "target: padding", "done": "planted", "status": "fail", "figure": 0.17, "meaning": "It counts."}
    if logged == 40:
        counts = {"pass": 0, "fail": 1, "skip": 0}
        records.append({"step": 40, "audit": "end", "audit_counts": counts, "audit_findings": [finding]})
    records.append({"step": 20, "samples": [["The sea", "is <b>wet</b>\nand blue"], ["DNA", "is"]]})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
