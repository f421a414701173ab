"""Measures the time of the audit, and checks that correct models of full size pass it.

    python bench/audit.py                     the presets up to 159M, and SmolLM2 where it is installed
    python bench/audit.py /tmp/converted      also another model folder

The presets are also audited under torch.compile (inductor). Writes docs/results/audit.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from smolseek.model.transformer import new_model
from smolseek.presets import preset

COMPILED = {name: f"bench.audit:compiled_{name}" for name in ("tiny", "seed_159m", "deepseek_159m")}


def compiled_tiny() -> torch.nn.Module:
    return torch.compile(new_model(preset("tiny")))


def compiled_seed_159m() -> torch.nn.Module:
    return torch.compile(new_model(preset("seed_159m")))


def compiled_deepseek_159m() -> torch.nn.Module:
    return torch.compile(new_model(preset("deepseek_159m")))


def main() -> None:
    from machine import describe  # found only if this file is run as a script, not if it is imported

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("docs/results/audit.json"))
    args = parser.parse_args()
    presets = [(name, kind) for name in ("tiny", "seed_159m", "deepseek_159m") for kind in ("float32", "bfloat16")]
    others = [*COMPILED.values(), "smollm2", *args.targets]
    audits = []
    for target, dtype in [*presets, *((target, "auto") for target in others)]:
        start = time.perf_counter()
        command = [sys.executable, "-m", "smolseek", "audit", target, "--dtype", dtype, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode not in (0, 1):
            print(f"{target:32} {dtype:9} {done.stderr.strip()}")
            continue
        findings = json.loads(done.stdout)["findings"]
        failed = [finding["check"] for finding in findings if finding["status"] == "fail"]
        passed = sum(finding["status"] == "pass" for finding in findings)
        audits.append({"target": target, "dtype": dtype, "seconds": seconds, "passed": passed, "failed": failed})
        print(
            f"{target:32} {dtype:9} {seconds:6.1f} s  {passed} passed, failed: {', '.join(failed) or 'none'}",
            flush=True,
        )
    result = {**describe(), "command": " ".join(["python bench/audit.py", *args.targets]), "audits": audits}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
