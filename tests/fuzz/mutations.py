"""Valid commands, and mutations of commands and files: errors that people, disks and other programs make.

A case depends only on its seed. It is a valid command with one to three mutations of its arguments, its files or its
environment (variables, standard input, encoding of the terminal).
"""

import contextlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sandbox

from smolseek.storage.manifest import MANIFEST, TRAINING, digest, manifest_text

FIT = "--calibration text.jsonl --calibration-tokens 64"
READ = "--data text.jsonl --tokens 64 --seq-len 16"
TRAIN = f"--data text.jsonl --run new --steps 3 --save-every 2 {sandbox.SMALL}"

COMMANDS = [
    "inspect tiny",
    "inspect run --memory --device cpu",
    "inspect llama --seq-len 32",
    "inspect model.gguf",
    "inspect tiny --mesh.data 2 --mesh.expert 2",
    f"train tiny --tokenizer llama {TRAIN} {sandbox.SHAPE}",
    f"train --init llama {TRAIN}",
    f"train --init deep {TRAIN} --optim.kind muon",
    "train --run run --resume",
    "train --run run --resume --eval-every 3 --keep-last 1",
    "train run/config.json --run new --steps 2",
    f"train tiny --tokenizer llama {TRAIN} {sandbox.SHAPE} --data tokens",
    f"train tiny --tokenizer llama {TRAIN} {sandbox.SHAPE} --data table.parquet --data.val-sources texts",
    f"train --init half --distill.teacher llama {TRAIN}",
    "prepare new --data text.jsonl --tokenizer llama",
    "prepare new --data texts table.parquet --tokenizer llama --tokens 500",
    "prepare tokens --data text.jsonl --tokenizer llama",
    "generate llama river --max-tokens 3",
    "generate run river --max-tokens 3 --temperature 0.9 --top-k 5 --top-p 0.9 --stats",
    "generate deep river --max-tokens 3 --beams 2 --n 2 --json",
    "generate model.gguf - --max-tokens 3 --greedy",
    "generate half river --max-tokens 3 --stop light --prefix old --bad-words red --no-repeat-ngram 2",
    "chat llama --max-tokens 3 --system brief",
    "chat model.gguf --max-tokens 3 --temperature 0",
    "convert llama new",
    "convert llama new --experts 3 --dtype bfloat16",
    "convert model.gguf new --mode grow --experts 2 --top-k 1",
    f"convert llama new --mode compress --cache 0.5 --profile hf-exact {FIT}",
    f"convert llama new --mode compress --experts 3 --shared 1 --active 1 {FIT}",
    "heal half --teacher llama --run new --tokens 32 --batch-size 1 --seq-len 16 --calibration text.jsonl "
    "--held-out-tokens 32",
    f"compare llama deep {READ}",
    f"compare llama model.gguf {READ} --json",
    f"compare deep half {READ} --engine transformers",
    "eval llama --tasks arc_easy --limit 2",
    "report run",
    "report run run --out page.html",
    "audit llama --data text.jsonl",
    "audit run --json",
    "audit foreign --data texts --fix-hints",
]

STDIN = "river\n/params temperature=0.5 top_k=3\nThe old\n/save talk.json\n/system be brief\n/reset\n/help\n"

_NUMBERS = (
    "0 -0 1 -1 2 3 7 0.5 1.5 -1.5 nan -nan inf -inf 1e400 -1e400 1e-400 1e308 1e30 1e9 1e-9 2147483648 4294967296 "
    "9223372036854775807 9223372036854775808 18446744073709551616 99999999999999999999999999 1_000 0x10 0b1 1e3 1,000 "
    "٣ ３ ½ ² +1 --1 1. .5 1/2 5% True false None null"
)
NUMBERS = [*_NUMBERS.split(), "9" * 5000, " 3 ", "3\n"]

TEXTS = [
    "",
    " ",
    "\n",
    "\t\r\n",
    "-",
    "--",
    "---",
    "=",
    "--=",
    "a=b",
    "~",
    "~nobody/x",
    ".",
    "..",
    "/",
    "./",
    "*",
    "%s %d {} {0} $HOME `x` $(x)",
    "a\0b",
    "\udcff\udcfe",
    "\ud83d",
    "💥🙂",
    "é",
    "e\u0301",
    "\u202e\u200b\ufeff",
    "\x1b[31m\x07",
    "x" * 300,
    "x" * 20_000,
    "x/" * 3000,
    "[bold]x[/nope]",
    "{'a': 1}",
    "\"quoted\" 'text'",
    "builtin",
    "self",
    "tiny",
    "None",
    "owner/name",
    "owner/name:part",
    "a/b/c",
    "os:getcwd",
    "json:loads",
    "no.such:thing",
    "A=0.7,B=0.3",
    "cosmopedia-v2",
    "http://localhost/x",
    "file:///etc/passwd",
    "/dev/null",
    "/dev/full",
    "/dev/stdin",
    "/proc/self/mem",
    "/proc/nothing/new",
    "/sys/new",
    "/etc/shadow/x",
    "nothing",
    "nothing/new",
]

_PLACES = (
    "llama deep half foreign run tokens texts model.gguf text.jsonl table.parquet run/config.json run/metrics.jsonl "
    "run/checkpoints run/checkpoints/step-000002 run/checkpoints/step-000002/model.safetensors llama/model.safetensors "
    "llama/tokenizer.json llama/config.json text.jsonl/new llama/new tokens/index.json"
)
PLACES = _PLACES.split()

ENVIRONMENT: list[dict[str, str | None]] = [
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"},
    {"RANK": "3"},
    {"RANK": "x", "WORLD_SIZE": "1"},
    {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "-1"},
    {"WORLD_SIZE": "four"},
    {"WORLD_SIZE": ""},
    {"WORLD_SIZE": "4"},
    {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999999"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"},
    {"LOCAL_RANK": "x"},
    {"LOCAL_RANK": ""},
    {"LOCAL_WORLD_SIZE": "many", "LOCAL_RANK": "0"},
    {"MASTER_ADDR": "", "MASTER_PORT": ""},
    {"TORCHELASTIC_RESTART_COUNT": "x"},
    {"TORCHELASTIC_RESTART_COUNT": "2"},
    {"SLURM_JOB_ID": "x", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"},
    {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMI_RANK": "1", "PMI_SIZE": "x"},
    {"CUDA_VISIBLE_DEVICES": "abc", "NVIDIA_VISIBLE_DEVICES": "void"},
    {"CUDA_VISIBLE_DEVICES": ""},
    {"OMP_NUM_THREADS": "abc", "MKL_NUM_THREADS": "-1"},
    {"OMP_NUM_THREADS": "0"},
    {"TOKENIZERS_PARALLELISM": "maybe", "RAYON_NUM_THREADS": "x"},
    {"TERM": "nonsense", "COLUMNS": "0", "LINES": "0"},
    {"TERM": None, "COLUMNS": "x"},
    {"COLUMNS": "20"},
    {"COLUMNS": "1"},
    {"COLUMNS": "-5", "NO_COLOR": "1", "FORCE_COLOR": "1"},
    {"LANG": "C", "LC_ALL": "C"},
    {"LANG": "xx_XX.nonsense", "LC_ALL": "tr_TR.UTF-8"},
    {"HOME": None, "XDG_CACHE_HOME": None},
    {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/proc/nope"},
    {"HOME": "", "XDG_CACHE_HOME": ""},
    {"HF_HOME": "/proc/nope", "HF_HUB_CACHE": "/dev/null/x", "HF_DATASETS_CACHE": "/proc/nope"},
    {"TMPDIR": "/nonexistent", "TEMP": "/nonexistent"},
    {"XDG_CACHE_HOME": "/dev/null"},
    {"CC": "nonsense", "XDG_CACHE_HOME": "empty-cache"},
    {"CC": "false", "XDG_CACHE_HOME": "empty-cache"},
    {"CC": "cc -O2 'unclosed", "CFLAGS": "--nonsense"},
    {"PATH": "", "CC": ""},
    {"PYTHONHASHSEED": "x", "PYTHONPATH": "\udcff"},
    {"HF_TOKEN": "x\ny", "HF_ENDPOINT": "no url", "HTTPS_PROXY": "::::"},
    {"TORCH_LOGS": "nonsense", "TORCH_DEVICE_BACKEND_AUTOLOAD": "x"},
    {"SMOLSEEK_X": "1", "TRITON_INTERPRET": "x", "TORCHDYNAMO_DISABLE": "x"},
]

ENCODINGS = ("ascii", "latin-1", "cp1252", "cp437", "euc-jp")

JSON_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    -0.0,
    0.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    1e-320,
    "",
    "x",
    "1",
    "nan",
    "\ud800",
    "\u0000",
    "../../x",
    "/etc/passwd",
    [],
    [1],
    [None],
    [0, 1, 2],
    [[[]]],
    {},
    {"a": 1},
    {"": {}},
    [{}],
]


@dataclass
class Case:
    """A command with its folder and its environment."""

    arguments: list[str]
    stdin: bytes = STDIN.encode()
    environment: dict[str, str | None] = field(default_factory=dict)
    encoding: str = "utf-8"
    done: list[str] = field(default_factory=list)
    """What was mutated, as text."""
    files: int = 0
    """Mutations of files."""


class Options(dict[str, list[str]]):
    """The options of each verb; for a word that is no verb, the options of `train`."""

    def __missing__(self, verb: str) -> list[str]:
        return self["train"]


def draw(seed: str, folder: Path, options: dict[str, list[str]], number: int) -> Case:
    """Return the case of `seed`, after mutating its files in `folder`.

    `options` has the options of each verb. The kind of mutation depends on `number`, so that few cases cover all kinds.
    """
    rng = random.Random(seed)
    case = Case(rng.choice(COMMANDS).split())
    kinds = list(KINDS)
    for turn in range(rng.choice((1, 1, 1, 1, 2, 3))):
        kind = kinds[number % len(kinds)] if turn == 0 else rng.choice(kinds)
        KINDS[kind](rng, case, folder, options)
    return case


# -- arguments


def _option_value(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Set an option, present or not, to an edge value."""
    names = options[case.arguments[0] if case.arguments else "train"]
    there = [i for i, word in enumerate(case.arguments[:-1]) if word.startswith("--")]
    value = rng.choice(NUMBERS if rng.random() < 0.6 else TEXTS if rng.random() < 0.6 else PLACES)
    if there and rng.random() < 0.4:
        at = rng.choice(there)
        name = case.arguments[at]
        if not case.arguments[at + 1].startswith("--"):
            del case.arguments[at + 1]
        case.arguments[at : at + 1] = [f"{name}={value}"] if rng.random() < 0.3 else [name, value]
    else:
        name = rng.choice(names)
        case.arguments += [f"{name}={value}"] if rng.random() < 0.3 else [name, value]
    case.done.append(f"{name} {value[:40]!r}")


def _word(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Drop, double, swap, cut, recase, replace or insert a word."""
    if not case.arguments:
        return
    at = rng.randrange(len(case.arguments))
    word = case.arguments[at]
    kind = rng.choice(("drop", "double", "swap", "cut", "case", "replace", "insert", "letters", "join"))
    if kind == "drop":
        del case.arguments[at]
    elif kind == "double":
        case.arguments[at:at] = case.arguments[at : at + 2]
    elif kind == "swap":
        other = rng.randrange(len(case.arguments))
        case.arguments[at], case.arguments[other] = case.arguments[other], word
    elif kind == "cut":
        case.arguments[at] = word[: rng.randrange(len(word) + 1)]
    elif kind == "case":
        case.arguments[at] = word.swapcase().replace("-", "_")
    elif kind == "letters":
        case.arguments[at] = "".join(rng.sample(word, len(word)))
    elif kind == "join":
        case.arguments[at : at + 2] = ["=".join(case.arguments[at : at + 2])]
    else:
        case.arguments[at : at + (kind == "replace")] = [rng.choice(TEXTS + NUMBERS)]
    case.done.append(f"{kind} {word!r}")


def _target(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Replace a path by another path: a file for a folder, a run for a model, an existing output."""
    places = [i for i, word in enumerate(case.arguments) if word in ("new", "page.html") or (folder / word).exists()]
    if not places:
        return _word(rng, case, folder, options)
    at = rng.choice(places)
    before = case.arguments[at]
    case.arguments[at] = rng.choice(PLACES + TEXTS)
    case.done.append(f"{before} -> {case.arguments[at][:40]!r}")
    return None


# -- environment of a command


def _environment(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Set environment variables to values that other programs may set."""
    variables = rng.choice(ENVIRONMENT)
    case.environment |= variables
    case.done.append(str(variables))


def _input(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Change standard input or the encoding of the terminal."""
    if rng.random() < 0.5:
        case.encoding = rng.choice(ENCODINGS)
        case.done.append(case.encoding)
        return
    lines = [rng.choice(TEXTS + NUMBERS) for _ in range(3)]
    lines += [f"/params {rng.choice(('top_k', 'top_p', 'temperature', 'seed', 'x', ''))}={rng.choice(NUMBERS)}"]
    lines += [f"/save {rng.choice(TEXTS)}", f"/system {rng.choice(TEXTS)}", f"/{rng.choice(TEXTS)}", "/params 'a"]
    text = "\n".join(rng.sample(lines, 4)).encode("utf-8", "surrogatepass")
    case.stdin = rng.choice((b"", b"\n", b"\xff\xfe\x80", b"\0\0", b"\xef\xbb\xbfriver", text, text[:5] * 9999, text))
    case.done.append(f"stdin {case.stdin[:30]!r}")


# -- files


def _file(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Damage one of the files that the command names."""
    files = _named(case, folder)
    if not files:
        return _word(rng, case, folder, options)
    path = rng.choice(files)
    change = DEEP.get(path.suffix, _bytes) if rng.random() < 0.7 else _bytes
    try:
        what = change(rng, path)
    except (LookupError, TypeError, ValueError, struct.error):  # an earlier mutation removed the file or its format
        what = _bytes(rng, path)
    case.files += 1
    case.done.append(f"{path.relative_to(folder)}: {what}")
    for parent in path.parents:
        if (parent / TRAINING / MANIFEST).is_file() and path.name != MANIFEST and rng.random() < 0.7:
            _sign(parent)
            case.done.append("signed")
    return None


def _named(case: Case, folder: Path) -> list[Path]:
    """Return the files that a command reads. Files whose kind matters most are repeated in the list."""
    files: list[Path] = []
    for word in case.arguments[1:]:
        with contextlib.suppress(OSError, ValueError):
            place = folder / word
            if word and place != folder and place.is_relative_to(folder):
                inside = [place] if place.is_file() else sorted(place.rglob("*"))
                files += [path for path in inside if path.is_file() and not path.is_symlink()]
    weights = {".json": 3, ".gguf": 8, ".jsonl": 2, ".safetensors": 2}
    return [path for path in dict.fromkeys(files) for _ in range(weights.get(path.suffix, 1))]


def _sign(checkpoint: Path) -> None:
    """Update the manifest to the present files, so that they pass verification."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "sha256": digest(path)}
    (checkpoint / TRAINING / MANIFEST).write_text(manifest_text(files), encoding="utf-8")


def _bytes(rng: random.Random, path: Path) -> str:
    """Damage the bytes of a file as disks, editors and people do."""
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    kind = rng.choice(
        (
            *(
                "empty",
                "truncate",
                "truncate",
                "flip",
                "flip",
                "zeros",
                "insert",
                "delete",
                "folder",
                "loop",
                "dangling",
            ),
            *("null device", "utf-16", "bom", "latin-1", "double", "reverse", "random", "crlf", "huge line", "head"),
        )
    )
    if kind in ("delete", "folder", "loop", "dangling", "null device"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind != "delete":
            path.symlink_to({"loop": path.name, "dangling": "nowhere", "null device": "/dev/null"}[kind])
        return kind
    at = rng.randrange(len(data) + 1)
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice((1, 3, 20))):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        changed[at : at + 64] = bytes(64)
    elif kind == "insert":
        changed[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\n", b"}", b"\xed\xa0\x80", b"\x1b[2J"))
    new = {
        "empty": b"",
        "truncate": data[:at],
        "head": data[: rng.randrange(12)],
        "utf-16": text.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + data,
        "latin-1": data + "é".encode("latin-1"),
        "double": data + data,
        "reverse": data[::-1],
        "random": rng.randbytes(len(data)),
        "crlf": data.replace(b"\n", b"\r\n"),
        "huge line": data.replace(b"\n", b" ") + b"x" * 100_000,
    }.get(kind, bytes(changed))
    path.write_bytes(new)
    return kind


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1)


def _json(rng: random.Random, path: Path) -> str:
    """Change the values of a JSON file, or its text in unusual ways."""
    text = path.read_text(encoding="utf-8")
    kind = rng.choice(("value", "value", "value", "value", "key", "key", "whole", "text"))
    if kind == "text":
        new = rng.choice(
            (
                "[" * 100_000,
                '{"a":' * 5000 + "1" + "}" * 5000,
                text.replace("{", '{"model_type": 1, ', 1),
                text.replace(":", ": " + "9" * 5000 + '\n, "x":', 1),
                text.replace('"', "'"),
                "// a comment\n" + text,
                text.rstrip()[:-1] + ",}",
                "null",
                '"text"',
                "NaN",
                "3",
            )
        )
        path.write_text(new, encoding="utf-8")
        return f"text {new[:30]!r}"
    try:
        value = json.loads(text)
    except ValueError:
        return _bytes(rng, path)
    if kind == "whole":
        value, what = rng.choice(JSON_VALUES), "another value"
    else:
        what = _change(rng, value, kind)
    path.write_text(_dump(value), encoding="utf-8", errors="surrogatepass")
    return what


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Return (container, key) of the values in a JSON value, and only a few for a long list."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    values = []
    for key, inner in items[:40]:
        values.append((value, key))
        if depth < 4:
            values += _places(inner, depth + 1)
    return values


def _change(rng: random.Random, value: Any, kind: str = "value") -> str:
    """Change one value within a JSON value."""
    places = _places(value)
    if not places:
        return "unchanged"
    # Choose values of the top level as often as the many values below it.
    at, key = rng.choice(places if rng.random() < 0.5 else [place for place in places if place[0] is value])
    if kind == "key" and isinstance(at, dict):
        held = at.pop(key)
        how = rng.choice(("gone", "renamed", "wrapped"))
        if how == "renamed":
            at[key + "x"] = held
        elif how == "wrapped":
            at[key] = rng.choice(([held], {key: held}, [held] * 3, str(held), [held, None]))
        return f"{key} {how}"
    at[key] = new = rng.choice(JSON_VALUES)
    return f"{key} = {str(new)[:30]!r}"


def _json_line(rng: random.Random, path: Path) -> str:
    """Change one line of JSON."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(("value", "key", "cut", "whole", "order", "empty"))
    if kind in ("value", "key"):
        value = json.loads(lines[at])
        kind = _change(rng, value, kind)
        lines[at] = json.dumps(value)
    elif kind == "cut":
        lines[at] = lines[at][: rng.randrange(len(lines[at]))]
    elif kind == "whole":
        lines[at] = json.dumps(rng.choice(JSON_VALUES))
    elif kind == "order":
        rng.shuffle(lines)
    else:
        lines[at] = rng.choice(("", " ", "[" * 100_000, "\0"))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {at + 1} {kind}"


def _safetensors(rng: random.Random, path: Path) -> str:
    """Change the header or the numbers of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return _bytes(rng, path)
    name = rng.choice(names)
    kind = rng.choice(("header", "header", "length", "type", "shape", "name", "drop", "numbers", "numbers", "numbers"))
    if kind == "header":
        kind = _change(rng, header, rng.choice(("value", "key")))
    elif kind == "type":
        header[name]["dtype"] = rng.choice(("I32", "U32", "F64", "BF16", "F8_E4M3", "BOOL", "C64", "F4", "nonsense"))
    elif kind == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], shape[1:], [0], [-1], [1 << 62, 4]))
    elif kind == "name":
        header[rng.choice(("model.extra.weight", "", "x" * 5000, "lm_head.bias"))] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "numbers":
        begin, end = header[name]["data_offsets"]
        number = rng.choice((float("nan"), float("inf"), float("-inf"), 3e38, 0.0, -1e30))
        count = (end - begin) // 4 if rng.random() < 0.5 else min(1, (end - begin) // 4)
        at = begin + 4 * rng.randrange(max(1, (end - begin) // 4 - count + 1))
        body[at : at + 4 * count] = struct.pack("<f", number) * count
        kind = f"{count} numbers {number}"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = rng.choice((0, 1, 1 << 40, (1 << 64) - 1, len(text) + 1)) if kind == "length" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(body))
    return f"{name[-30:]} {kind}"


def _gguf(rng: random.Random, path: Path) -> str:
    """Write an edge value into a GGUF header (counts, lengths, types, sizes) or into the rest of the file."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:  # after the name of a setting: its type and its value
        keys = [
            i
            for i in range(min(len(data), 12_000))
            if data[i : i + 6] == b"llama." or data[i : i + 10] == b"tokenizer."
        ]
        start = rng.choice(keys)
        length = struct.unpack_from("<Q", data, start - 8)[0]
        at = start + length + rng.choice((0, 4, 8, 12))
        name = bytes(data[start : start + length]).decode("utf-8", "replace")
    else:
        at, name = rng.randrange(min(len(data) - 8, 14_000) if rng.random() < 0.8 else len(data) - 8), "byte"
    number = rng.choice((0, 1, 2, 3, 7, 8, 9, 10, 100, 0xFFFF, 0x7FC00000, 0xFFFFFFFF, 1 << 32, 1 << 62, (1 << 64) - 1))
    new = number.to_bytes(8, "little")[: 4 if number < 1 << 32 else 8]
    data[at : at + len(new)] = new
    path.write_bytes(bytes(data))
    return f"{name} at {at} = {number}"


DEEP: dict[str, Callable[[random.Random, Path], str]] = {
    ".json": _json,
    ".jsonl": _json_line,
    ".safetensors": _safetensors,
    ".gguf": _gguf,
}
"""Mutations for each file format."""


def _output(rng: random.Random, case: Case, folder: Path, options: dict[str, list[str]]) -> None:
    """Create something at the place where the command writes."""
    outputs = [word for word in case.arguments if word in ("new", "page.html", "tokens")] or ["new"]
    place = folder / outputs[0]
    kind = rng.choice(
        ("file", "folder with a file", "empty folder", "link", "loop", "copy of a run", "copy of a model")
    )
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    if kind == "file":
        place.write_text("kept")
    elif kind == "folder with a file":
        place.mkdir()
        (place / rng.choice(("kept", "config.json", "index.json", "metrics.jsonl", "checkpoints"))).write_text("kept")
    elif kind == "empty folder":
        place.mkdir()
    elif kind in ("link", "loop"):
        place.symlink_to("nowhere/new" if kind == "link" else place.name)
    else:
        shutil.copytree(folder / ("run" if kind == "copy of a run" else "llama"), place)
    case.files += 1
    case.done.append(f"{place.name} is a {kind}")


Mutation = Callable[[random.Random, Case, Path, dict[str, list[str]]], None]
KINDS: dict[str, Mutation] = {
    "option": _option_value,
    "file": _file,
    "word": _word,
    "file again": _file,
    "target": _target,
    "environment": _environment,
    "file once more": _file,
    "option again": _option_value,
    "input": _input,
    "output": _output,
}


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return the contents of a folder: the kind of each path, and the contents of each file."""
    contents: dict[str, tuple[Any, ...]] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            key = str(path.relative_to(folder))
            if path.is_symlink():
                contents[key] = ("link", os.readlink(path))
            elif path.is_dir():
                contents[key] = ("folder",)
            else:
                contents[key] = ("file", path.read_bytes())
    return contents
