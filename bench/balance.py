"""Measures the global MaxVio of `tiny` with and without loss-free balancing, on the same data.

    python bench/balance.py            300 steps each, about three minutes a run on two cores

Prints a table and writes docs/results/balance.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

from machine import describe

from smolseek.config import BalanceConfig, DataConfig, TrainConfig
from smolseek.presets import preset
from smolseek.run_folder import RunFolder
from smolseek.train.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gamma", type=float, default=BalanceConfig.gamma)
    parser.add_argument("--out", type=Path, default=Path("docs/results/balance.json"))
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for gamma in (args.gamma, 0.0):
            config = TrainConfig(
                model=preset("tiny"),
                run=f"{folder}/gamma-{gamma:g}",
                steps=args.steps,
                batch_size=8,
                data=DataConfig(val_fraction=0.05),
                balance=BalanceConfig(gamma=gamma),
                save_every=args.steps,
                sample_tokens=0,
            )
            train(config)
            last = [r for r in RunFolder(Path(config.run)).read_metrics() if "val_maxvio" in r][-1]
            runs.append({"gamma": gamma, **{k: last[k] for k in ("val_maxvio", "val_maxvio_layers", "val_loss")}})
    print(f"\n{'gamma':>8} {'MaxVio (global)':>16} {'by layer':>32} {'validation loss':>16}")
    for run in runs:
        layers = " ".join(f"{v:.3f}" for v in run["val_maxvio_layers"])
        print(f"{run['gamma']:8g} {run['val_maxvio']:16.3f} {layers:>32} {run['val_loss']:16.4f}")
    result = {**describe(), "command": "python bench/balance.py", "preset": "tiny", "steps": args.steps, "runs": runs}
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
