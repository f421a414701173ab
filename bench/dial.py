"""The dial: distance to SmolLM2-135M-Instruct at smaller caches, ours beside the published method.

    python bench/dial.py --data FILE ...     held-out text of several domains, each file one of them

Every model is made by the code of `smolseek convert`, calibrated on built-in text, and measured natively. Prints a
line a model and writes docs/results/dial.json after each, so that a run cut short keeps what it has.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from machine import describe

from smolseek.convert.calibrate import calibration_rows, statistics
from smolseek.convert.compress import Budget, assemble, compress
from smolseek.convert.refit import refit
from smolseek.evaluate.compare import compare_states, hidden_states, text_rows
from smolseek.storage.hf_folder import load_model

OUT = Path("docs/results/dial.json")
SHARES = {"1/2": 1 / 2, "2/3": 2 / 3, "1/3": 1 / 3}


@torch.no_grad()
def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=20_480, help="held-out tokens, an equal share of each file")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--folds", type=int, nargs="*", default=[1, 2, 4, 8], help="FreqFold of the published method")
    parser.add_argument("--shares", nargs="*", default=list(SHARES))
    args = parser.parse_args()
    source = load_model("smollm2")
    each = args.tokens // len(args.data)
    parts = [text_rows([file], "text", source.tokenizer, 512, each) for file in args.data]
    rows = torch.cat(parts)
    states, head = list(hidden_states(source.model, rows)), source.model.lm_head.weight.detach()
    found = json.loads(OUT.read_text()) if OUT.exists() else {"models": {}}
    calibration = calibration_rows(source.path, "builtin", args.calibration_tokens, seed=0)
    stats = statistics(source.model, calibration)
    for share in args.shares:
        features = round(SHARES[share] * source.config.cache_features)
        variants = {f"transmla, FreqFold {fold}": Budget(features, None, "transmla", fold) for fold in args.folds}
        for name, budget in {"smolseek": Budget(features), **variants}.items():
            begun = time.perf_counter()
            shape, layers = compress(source.model, budget, stats)
            if budget.method == "smolseek":
                layers = refit(source.model, shape, layers, calibration)
            model = assemble(source.model, shape, layers)
            seconds = time.perf_counter() - begun
            new = list(hidden_states(model, rows))
            at, domains = 0, {}
            for file, part in zip(args.data, parts, strict=True):
                end = at + len(part)
                domains[Path(file).stem] = compare_states(states[at:end], head, new[at:end], model.lm_head.weight, part)
                at = end
            tokens = sum(one.tokens for one in domains.values())
            kl, before, after = (
                sum(getattr(one, field) * one.tokens for one in domains.values()) / tokens
                for field in ("kl", "loss_a", "loss_b")
            )
            row = {
                "share": share,
                "kv_lora_rank": model.config.kv_lora_rank,
                "qk_rope_head_dim": model.config.qk_rope_head_dim,
                "kl": kl,
                "loss_a": before,
                "loss_b": after,
                "perplexity_change": math.exp(after - before) - 1,
                "tokens": tokens,
                "domains": {name: asdict(one) for name, one in domains.items()},
                "calibration_tokens": args.calibration_tokens,
                "measured": describe(),
            }
            found["models"][f"{share} {name}"] = row
            OUT.write_text(json.dumps(found, indent=2) + "\n")
            print(
                f"{share} {name}: rank {row['kv_lora_rank']}, rope {row['qk_rope_head_dim']}, KL {kl:.4f}, "
                f"perplexity {row['perplexity_change']:+.1%}, {tokens:,} tokens, fitted in {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
