"""The dial: distance to SmolLM2-135M-Instruct at smaller caches, ours beside the published method.

    python bench/dial.py --data FILE ...     held-out text of several domains, each file one of them

Every model is converted by the command's own code with built-in text for calibration, and measured natively. Prints a
line a model and writes docs/results/dial.json after each, so that a run cut short keeps what it has.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from machine import describe

from smolseek.convert.pipeline import Conversion, convert
from smolseek.evaluate.compare import compare_states, hidden_states, text_rows
from smolseek.storage.hf_folder import load_model

OUT = Path("docs/results/dial.json")
SHARES = {"-33%": 2 / 3, "-50%": 1 / 2, "-67%": 1 / 3}


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
    for share in args.shares:
        variants = {f"transmla, FreqFold {fold}": {"method": "transmla", "freq_fold": fold} for fold in args.folds}
        for name, options in {"smolseek": {}, **variants}.items():
            conversion = Conversion(
                mode="compress", cache=SHARES[share], calibration_tokens=args.calibration_tokens, **options
            )
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                path = convert("smollm2", Path(folder, "out"), conversion)
                seconds = time.perf_counter() - begun
                model = load_model(path).model
            new = list(hidden_states(model, rows))
            whole = compare_states(states, head, new, model.lm_head.weight, rows)
            at, domains = 0, {}
            for file, part in zip(args.data, parts, strict=True):
                end = at + len(part)
                one = compare_states(states[at:end], head, new[at:end], model.lm_head.weight, part)
                domains[Path(file).stem], at = one.kl, end
            config = model.config
            row = asdict(whole) | {
                "share": share,
                "kv_lora_rank": config.kv_lora_rank,
                "qk_rope_head_dim": config.qk_rope_head_dim,
                "perplexity_change": math.exp(whole.loss_b - whole.loss_a) - 1,
                "kl_by_domain": domains,
                "calibration_tokens": args.calibration_tokens,
                "convert_seconds": round(seconds, 1),
                "measured": describe(),
            }
            found["models"][f"{share} {name}"] = row
            OUT.write_text(json.dumps(found, indent=2) + "\n")
            print(
                f"{share} {name}: rank {row['kv_lora_rank']}, rope {row['qk_rope_head_dim']}, KL {whole.kl:.4f}, "
                f"perplexity {row['perplexity_change']:+.1%}, {whole.tokens:,} tokens, converted in {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
