"""Compares `smolseek prepare` on one document of 20 MB and on the same text in 3,000 documents: time, memory, tokens.

    python bench/long_document.py        a minute and a half on two cores

The text consists of several numbered copies of the English text in the running Python. The text is cut in front of line
breaks, where the tokenizer also splits a text. Both versions of the text are prepared alternately, each in a new
process, whose time and peak memory the operating system reports. Except for end tokens, both versions must give the
same tokens. The results are written to docs/results/long_document.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe

ROOT = Path(__file__).parents[1]
SIZE, DOCUMENTS = 20_000_000, 3_000
EOS = 0


def cut_text() -> list[str]:
    """Return the text, cut into `DOCUMENTS` documents."""
    from smolseek.data.sources import read_documents

    text = "\n\n".join(read_documents(["builtin"], "text"))
    copies = -(-SIZE // len(text))
    text = "\n".join(f"Copy {copy}.\n{text}" for copy in range(copies))[:SIZE]
    texts, start = [], 0
    for number in range(1, DOCUMENTS):
        end = text.find("\n", number * SIZE // DOCUMENTS)
        while text[end - 1].isspace():
            end = text.find("\n", end + 1)
        texts.append(text[start:end])
        start = end
    return [*texts, text[start:]]


def prepare(source: Path, out: Path) -> dict[str, float]:
    """Run `smolseek prepare`, and return its seconds, processor seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "smolseek", "prepare", str(out), "--data", str(source)]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


def tokens(out: Path) -> np.ndarray:
    """Return all tokens of a prepared folder except the end tokens."""
    ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted(out.glob("*.tokens"))])
    return ids[ids != EOS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/long_document.json")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {"one document": [], "3,000 documents": []}
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), cut_text()
        # A second document is added, because a single document would be cut for the validation split.
        for kind, documents in (
            ("one document", ["".join(texts), "The end."]),
            ("3,000 documents", [*texts, "The end."]),
        ):
            lines = (json.dumps({"text": text}) + "\n" for text in documents)
            (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")
        for number in range(args.rounds):
            for kind, results in measured.items():
                results.append(prepare(folder / f"{kind}.jsonl", folder / f"{kind} {number}"))
                print(kind, results[-1], flush=True)
        same = np.array_equal(*(tokens(folder / f"{kind} 0") for kind in measured))
        count = len(tokens(folder / "one document 0"))
    median = {
        kind: {key: statistics.median(row[key] for row in results) for key in results[0]}
        for kind, results in measured.items()
    }
    whole, parts = median.values()
    ratios = {key: whole[key] / parts[key] for key in whole}
    result = {**describe(), "command": "python bench/long_document.py", "bytes": SIZE, "tokens": count}
    result |= {"same_tokens": same, "rounds": measured, "median": median, "one_to_many": ratios}
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"the same tokens: {same}; one document to many: {ratios}")


if __name__ == "__main__":
    main()
