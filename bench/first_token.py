"""Measures the time from the start of `smolseek generate` to its first token, and where the time goes.

    python bench/first_token.py                    five runs after a warm-up run, about half a minute on two cores
    python bench/first_token.py --model runs/demo --rounds 3

`seconds` is the time from the start of the process until the first token has been read from its output. For the stages,
the same command runs again in a process that measures its imports and functions:

- start: Python, the command line and its options.
- import: PyTorch; the modules of smolseek; transformers, which makes the tokenizer.
- tokenizer: the vocabulary, after the import.
- read: the header of the file, and the model without weights.
- weights: reading, dequantising and rounding the weights, or copying their blocks.
- bind: loading the C library, and the cache and pointers for it.
- prompt: the forward pass over the prompt.
- rest: everything else, such as sampling and printing.

The result is written to docs/results/first_token.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe

OUT = Path(__file__).parents[1] / "docs" / "results" / "first_token.json"
PROMPT = "The structure of DNA"

# Runs the command with clocks around imports and functions. A clock counts no time of a clock inside it.
PROGRAM = """
import json, sys, time
began = float(sys.argv[1])
spent, inner = {}, [0.0]
def clocked(name, function):
    def run(*arguments, **options):
        start = time.time()
        inner.append(0.0)
        try:
            return function(*arguments, **options)
        finally:
            total = time.time() - start
            spent[name] = spent.get(name, 0.0) + total - inner.pop()
            inner[-1] += total
    return run
def replace(owner, attribute, name):
    setattr(owner, attribute, clocked(name, getattr(owner, attribute)))
from smolseek.cli import writing
parsed = []
def parse(*arguments):
    args = real(*arguments)
    parsed.append(time.time())
    clocked("import torch", __import__)("torch")
    clocked("import smolseek", __import__)("smolseek.api")
    # `from` and a name, since transformers imports lazily
    clocked("import transformers", exec)("from transformers import PreTrainedTokenizerFast")
    from smolseek import api
    from smolseek.generate import engine
    from smolseek.storage import hf_folder
    replace(hf_folder, "_open", "read")
    replace(hf_folder, "tokenizer_of", "tokenizer")
    replace(hf_folder, "_filled", "weights")
    replace(engine.Decoder, "__init__", "bind")
    replace(engine.Decoder, "prefill", "prompt")
    return args
real, writing.parse = writing.parse, parse
say = writing.console.stream
def stream(text):
    say(text)
    if text != sys.argv[3] and text.strip():
        total = time.time() - began
        spent["start"] = parsed[0] - began
        spent["rest"] = total - sum(spent.values())
        print(json.dumps({"total": total} | spent), file=sys.stderr, flush=True)
        raise SystemExit
writing.console.stream = stream
writing.generate([*sys.argv[2:4], "--max-tokens", "2", "--greedy"])
"""


def first_token(model: str) -> float:
    """Return the seconds from the start of the command until its first token is on the pipe."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "smolseek", "generate", model, PROMPT, "--max-tokens", "1", "--greedy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = b""
        while len(text.strip()) <= len(PROMPT):
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                raise SystemExit(f"{' '.join(command)} printed no token")
            text += piece
        return time.perf_counter() - began


def stages(model: str) -> dict[str, float]:
    """Return the seconds of each stage of one run."""
    command = [sys.executable, "-c", PROGRAM, str(time.time()), model, PROMPT]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stderr.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    first_token(args.model)  # warms the file cache, and builds the C library
    runs, measured = [], []
    for _ in range(args.rounds):
        runs.append(first_token(args.model))
        measured.append(stages(args.model))
    names = sorted(measured[0], key=lambda name: -statistics.median(run.get(name, 0.0) for run in measured))
    result = {
        **describe(),
        "command": f"python bench/first_token.py --model {args.model} --rounds {args.rounds}",
        "model": args.model,
        "seconds": statistics.median(runs),
        "smallest": min(runs),
        "largest": max(runs),
        "stages": {name: statistics.median(run.get(name, 0.0) for run in measured) for name in names},
    }
    print(f"first token after {result['seconds']:.2f} s ({min(runs):.2f} to {max(runs):.2f})")
    for name, spent in result["stages"].items():
        print(f"  {name:20} {spent:.2f} s")
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
