"""Finds names that have another meaning in this field: python tools/names.py (part of `make check`).

The script reads the names that src/smolseek defines: modules, classes, functions, arguments, variables and attributes
in Python, and the words of the C files. A name is split into parts at underscores and capitals. A name is refused if
one of its parts is in WORDS, and the value in WORDS says what to use. TERMS lists terms of the field that may contain
such a part. EXCEPTIONS lists allowed names, each with the reason why the name is right.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "smolseek"

WORDS = {
    "alone": "SingleProcess",
    "team": "DistributedContext",
    "lead": "is_main",
    "tell": "broadcast_object",
    "agree": "all_reduce",
    "meet": "rendezvous",
    "watch": "heartbeat",
    "beat": "heartbeat",
    "dealt": "sharded, partitioned",
    "parts": "local shards, the name of the things",
    "pieces": "state shards, chunks, the name of the things",
    "together": "sharded checkpoint",
    "whole": "full tensor, complete",
    "rows": "sequences, batch entries, shard",
    "pairs": "slots (token, expert), interleaved, dot2",
    "half": "bf16, the name of the part",
    "spread": "permute",
    "combine": "unpermute",
    "way": "permutation, direction",
    "places": "permutation, positions, indices",
    "fit": "supports",
    "fits": "supports",
    "join": "rope_and_pack",
    "joins": "rope_and_pack",
    "passes": "forward_backward",
    "recorded": "captured",
    "played": "replayed",
    "ends": "what is done before or after training; end, stop, boundaries",
    "feed": "datasets, stream",
    "ahead": "prefetch",
    "blocks": "mixture, chunks",
    "away": "unavailable",
    "fault": "RetryableError, error",
    "persist": "retry",
    "traffic": "read statistics",
    "settle": "bias calibration",
    "rest": "frozen weights, remaining",
    "heal": "recovery by distillation",
    "writer": "Generator, writer of what",
    "picker": "Sampler",
    "take": "reorder_cache, select, the verb of what is done",
    "strategy": "SamplingParams",
    "words": "arguments",
    "condense": "arguments",
    "asked": "query, requested",
    "held": "cached, held-out, memory",
    "lot": "batch",
    "seats": "slots",
    "worth": "importance",
    "dial": "trade-off curve",
    "yardsticks": "baselines",
    "house": "architecture",
    "floor": "layer",
    "wing": "package",
    "room": "module, space",
    "found": "the name of the thing",
    "own": "the name of the thing",
    "kept": "the name of the thing",
    "given": "the name of the thing",
}
# Terms that consist of two words.
TERMS = ("held_out",)
EXCEPTIONS: dict[str, str] = {
    "feed_forward": "the layer's standard name",
    "FeedForward": "the layer's standard name",
    "CheckpointWriter": "like StorageWriter of torch.distributed.checkpoint",
    "bad_words": "transformers' and vLLM's option",
    "bad_words_ids": "transformers' option",
    "blocks": "the blocks of a quantised matrix (ggml)",
    "parts": "a key of prepared data's index.json, which earlier releases wrote",
    "heal": "the command",
    "HealArgs": "arguments of the command `heal`",
    "_heal_config": "configuration of the command `heal`",
    "combine": "with `dispatch` the two halves of expert parallelism (DeepEP); of partial softmaxes (flash decoding)",
    "floor_lanes": "the mathematical floor",
    "_mm256_floor_ps": "Intel's name",
}
# The rows of matrices in kernels.
KERNEL_WORDS = ("rows",)


def python_names(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str(name)):
                yield 0, name


def c_names(text: str) -> Iterator[tuple[int, str]]:
    text = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    for line, content in enumerate(text.splitlines(), 1):
        for name in re.findall(r"[A-Za-z_]\w*", content):
            yield line, name


def refused(name: str, kernel: bool) -> list[str]:
    if name in EXCEPTIONS:
        return []
    name = re.sub("|".join(TERMS), "", name)
    words = [part.lower() for part in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]
    return [word for word in words if word in WORDS and not (kernel and word in KERNEL_WORDS)]


def main() -> int:
    count = 0
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix not in (".py", ".c", ".h"):
            continue
        text = path.read_text(encoding="utf-8")
        names = [
            (0, path.stem),
            (0, path.parent.name),
            *(python_names(text) if path.suffix == ".py" else c_names(text)),
        ]
        for line, name in sorted(set(names)):
            for word in refused(name, path.suffix != ".py" or path.name == "triton.py"):
                count += 1
                print(f"{path.relative_to(SOURCE)}:{line}: {name}: for `{word}` use {WORDS[word]}")
    return count > 0


if __name__ == "__main__":
    sys.exit(main())
