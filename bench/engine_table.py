"""Tables of README, docs/engines.md and docs/performance.md, from docs/results/. Run it to print those of engines."""

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


def decoding(result: dict) -> list[str]:
    """Return the rows of the table of speeds beside llama.cpp, of docs/results/decode_llamacpp.json."""
    lines = [
        "| model | weights | cache | decoding, ours and llama.cpp's, tokens/s | ratio | prompt, tokens/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"`{row['model']}`", row["form"], f"{row['cached']:,}"]
        for part in ("decode", "prompt"):
            low, high = row[f"{part}_ratio_spread"]
            cells.append(f"{row[f'{part}_ours_tokens_s']:,.0f}, {row[f'{part}_llamacpp_tokens_s']:,.0f}")
            cells.append(f"{row[f'{part}_ratio']:.2f} ({low:.2f}-{high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def decoding_kl(result: dict) -> list[str]:
    """Return the rows of the table of KL divergences beside llama.cpp."""
    lines = [
        "| model | weights | KL to the model in float32, ours and llama.cpp's | KL to the same weights in float32 |",
        "|---|---|---|---|",
    ]
    for row in {(row["model"], row["form"]): row for row in result["rows"] if "kl_ours_to_float32" in row}.values():
        pairs = (
            f"{row[f'kl_ours_to_{name}']:.1e}, {row[f'kl_llamacpp_to_{name}']:.1e}"
            for name in ("float32", "same_weights")
        )
        lines.append(f"| `{row['model']}` | {row['form']} | {' | '.join(pairs)} |")
    return lines


def cache(result: dict) -> dict[str, str]:
    """Return the bytes of cache per token that llama.cpp reports, by model."""
    return {row["model"]: f"{row['bytes_per_token']:,.0f}" for row in result["cache"]}


if __name__ == "__main__":
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    print("\n".join([*engines(result), "", *quantised(result), "", str(cache(result))]))
