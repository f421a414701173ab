"""Tables of README and docs/engines.md, from docs/results/engines.json. Run it to print the tables."""

import json
from pathlib import Path

RESULT = Path(__file__).parents[1] / "docs" / "results" / "engines.json"
READS = {
    "folder": "model folders and checkpoints, float32",
    "GGUF f32": "GGUF, F32",
    "GGUF bf16": "GGUF, BF16",
}
"""What an engine opens, by the form of the result's rows."""
NAMES = {"llamacpp": "llama.cpp, wheel of", "llamacpp_native": "llama.cpp, built by", "mlx": "", "vllm": ""}


def engines(result: dict) -> list[str]:
    """Return the rows of the table of engines: one for each engine and form."""
    lines = [
        "| engine | reads | models | greedy texts as in transformers | largest gap where a token differs | "
        "largest difference of log-probabilities |",
        "|---|---|---|---|---|---|",
    ]
    cases = sorted({(row["form"], row["engine"]) for row in result["texts"]}, key=lambda case: (case[1], case[0]))
    for form, engine in cases:
        rows = [row for row in result["texts"] if (row["form"], row["engine"]) == (form, engine)]
        done = [row for row in rows if "error" not in row]
        equal = f"{sum(row['equal'] for row in done)} of {sum(row['prompts'] for row in done)}"
        failed = f", {len(rows) - len(done)} cannot be opened" if len(done) < len(rows) else ""
        version = f"{NAMES[engine]} {done[-1]['version']}".strip() if done else engine
        largest = max((row["logprobs"] for row in done), default=float("nan"))
        gap = max((flip["difference"] for row in done for flip in row["flips"]), default=None)
        shown = "-" if gap is None else f"{gap:.1e}"
        lines.append(f"| {version} | {READS[form]} | {len(rows)}{failed} | {equal} | {shown} | {largest:.1e} |")
    lines += [f"| {engine} | not tried | | | | |" for engine in result["not_tried"]]
    return lines


def quantised(result: dict) -> list[str]:
    """Return the rows of the table of KL divergences: in llama.cpp, of the weights alone, and the size of the file."""
    forms = list(dict.fromkeys(row["form"] for row in result["kl"]))
    lines = ["| model | " + " | ".join(form.removeprefix("GGUF ").upper() for form in forms) + " |"]
    lines.append("|---" * (len(forms) + 1) + "|")
    for model in dict.fromkeys(row["model"] for row in result["kl"]):
        rows = {row["form"]: row for row in result["kl"] if row["model"] == model}
        cells = (f"{row['kl']:.1e} ({row['kl_weights']:.1e}), {row['bytes'] / 1e6:,.0f} MB" for row in rows.values())
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return lines


def cache(result: dict) -> dict[str, str]:
    """Return the bytes of cache per token that llama.cpp reports, by model."""
    return {row["model"]: f"{row['bytes_per_token']:,.0f}" for row in result["cache"]}


if __name__ == "__main__":
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    print("\n".join([*engines(result), "", *quantised(result), "", str(cache(result))]))
