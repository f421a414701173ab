"""Measures the share of repeated 4-grams with and without repetition handling, on the five prompts of train/samples.py.

    python bench/repetition.py                 SmolLM2-135M-Instruct, 200 tokens a prompt
    python bench/repetition.py --model runs/tiny --tokens 100

Prints a table and writes docs/results/repetition.json.
"""

import argparse
import json
from pathlib import Path

from machine import describe

from smolseek.api import load
from smolseek.train.samples import PROMPTS

CASES = {
    "greedy": {"temperature": 0.0},
    "greedy, repetition penalty 1.1": {"temperature": 0.0, "repetition_penalty": 1.1},
    "greedy, frequency penalty 0.5": {"temperature": 0.0, "frequency_penalty": 0.5},
    "greedy, no repeated 4-gram": {"temperature": 0.0, "no_repeat_ngram": 4},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "temperature 0.8, min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "temperature 0.8, repetition penalty 1.1": {"temperature": 0.8, "repetition_penalty": 1.1},
}


def repeated(tokens: list[int], n: int = 4) -> float:
    """Return the share of the n-grams that have occurred before in the same text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("docs/results/repetition.json"))
    args = parser.parse_args()
    model = load(args.model, dtype=args.dtype)
    cases = []
    print(f"{'strategy':40} {'repeated 4-grams':>17} {'log-probability':>16}")
    for name, options in CASES.items():
        results = [one.result for one in model.generate(PROMPTS, max_tokens=args.tokens, **options)]
        share = sum(repeated(generated.tokens) for generated in results) / len(results)
        logprobs = [p for generated in results for p in generated.logprobs]
        cases.append({"strategy": name, "options": options, "repeated_4grams": share})
        cases[-1]["mean_logprob"] = sum(logprobs) / len(logprobs)
        print(f"{name:40} {share:17.1%} {cases[-1]['mean_logprob']:16.3f}", flush=True)
    about = {**describe(), "command": "python bench/repetition.py", "model": args.model, "tokens": args.tokens}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, "seed": 0, "rows": cases}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
