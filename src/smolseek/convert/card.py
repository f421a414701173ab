"""The model card of a converted model: README.md with the front matter that the hub reads."""

import re
import shlex
from pathlib import Path

from smolseek.config import ModelConfig
from smolseek.gguf_header import read_metadata
from smolseek.model.summary import cache_bytes, count
from smolseek.tokenizer import SMOLLM2_HUB

UNLIKE_CALIBRATION = (
    "Text unlike the calibration text does worse. For reference, SmolLM2-135M-Instruct at half of its cache: mean KL "
    "0.11 nats per token on manuals, 0.29 on a novel, 0.24 on a jargon dictionary, 0.23 on quotations and 0.26 on "
    "encyclopedia passages with --calibration builtin; 0.23, 0.23, 0.18 and 0.16 on the last four with "
    "--calibration self"
)
"""What a figure of a compressed model does not say, printed and written beside it."""

_CLAIMS = (
    "computes the function of the original.",
    "is smaller, and comes near the function of the original as far as the line `Measured` says.",
)

_NEEDS = (
    "It has one ladder of rotary frequencies and one epsilon, as DeepSeek's own models.",
    "It uses the rope type `longrope` with latent attention, which transformers and smolseek compute; others may not.",
)


def model_card(
    source: str,
    path: Path,
    before: ModelConfig,
    after: ModelConfig,
    mode: str,
    dtype: str,
    command: str,
    fidelity: str | None,
) -> str:
    """Return the text of README.md.

    Args:
        source: what the user called the source.
        path: where it lay.
        before: the source's shape.
        after: the converted model's shape.
        mode: the mode in words.
        dtype: number format of the weights.
        command: the command that made the model.
        fidelity: the measured line, None when it was not verified.
    """
    license_name, base = _origin(source, path)
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"license: {license_name}"] if license_name else []
    front += [f"base_model: {base}", "base_model_relation: finetune"] if base else []
    front += ["tags:", "- deepseek_v3", "- mla", "- smolseek", "---"]
    name = base or (path.name if path.exists() else source)
    compressed = mode.startswith("compress")
    counted, cached = count(after), cache_bytes(after)["MLA"]
    was = before.num_hidden_layers * before.cache_features * 2
    body = [
        f"# {name} as DeepSeek-V3",
        "",
        f"The weights of {name}, converted from Llama to `DeepseekV3ForCausalLM`. Nothing was trained: the new model",
        _CLAIMS[compressed],
        "",
        f"- Mode: {mode}; {dtype}",
        f"- Parameters: {counted.total:,}, {counted.active:,} active per token (original: {count(before).total:,})",
        f"- Cache per token in 16 bits: {cached:,} bytes (original: {was:,})",
        f"- Licence: {license_name or 'that of the original'}",
        f"- Measured: {fidelity or 'not verified'}",
        *([f"- {UNLIKE_CALIBRATION}."] if compressed else []),
        f"- Made with: `{command}`",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "It needs no remote code. " + _NEEDS[after.rope_parameters.rope_type == "longrope"],
        "Use float32 or bfloat16, never float16: the weights of the latent are too small for it.",
        "",
    ]
    return "\n".join([*front, "", *body])


def measured_on(calibration: str) -> str:
    """Return on which text a compressed model was measured."""
    kinds = {"builtin": "the manuals and docstrings of Python", "self": "text that the source wrote"}
    return f"measured on {kinds.get(calibration, calibration)}, a part that the calibration did not see"


def source_of(folder: Path) -> str | None:
    """Return what `smolseek convert` called the source of the model in `folder`, by its card; None where none says."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^- Made with: `smolseek convert (.*)`$", text, re.M)
    try:
        words = shlex.split(found[1]) if found else []
    except ValueError:  # written by hand
        return None
    return words[0] if words else None


def _origin(source: str, path: Path) -> tuple[str | None, str | None]:
    """Return licence and hub name of the source, each None when nothing tells it."""
    hub_name = source if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not Path(source).exists() else None
    if path.is_file():
        meta = read_metadata(path)
        hub_name = SMOLLM2_HUB if source == "smollm2" else None
        license_name = meta.get("general.license")
        return (license_name if isinstance(license_name, str) else None), hub_name
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.search(r"^license:\s*(\S+)\s*$", front[1], re.M) if front else None
    return (found[1] if found else None), hub_name
