"""Makes the model card of a converted model: README.md with the front matter that the hub reads."""

import re
import shlex
from pathlib import Path

from smolseek.config import ModelConfig
from smolseek.convert.source import Source
from smolseek.gguf_header import read_header
from smolseek.model.summary import cache_bytes, count
from smolseek.tokenizer import SMOLLM2_HUB

UNLIKE_CALIBRATION = (
    "Text unlike the calibration text does worse. For reference, SmolLM2-135M-Instruct at half of its cache: mean KL "
    "0.11 nats per token on manuals, 0.28 on a novel, 0.24 on a jargon dictionary, 0.22 on quotations and 0.26 on "
    "encyclopedia passages with --calibration builtin; 0.23, 0.23, 0.18 and 0.16 on the last four with "
    "--calibration self --profile hf-exact"
)
"""Warning that is printed with the results of a compressed model, and written into its model card."""
CALIBRATION_TEXT = {"builtin": "the manuals and docstrings of Python", "self": "text that the source wrote"}

_CLAIMS = (
    "computes the function of the original.",
    "is smaller, and approximates the function of the original. The line `Measured` says how closely.",
)

_ENGINES = {
    "portable": "Like DeepSeek's own models, it uses the default RoPE and one epsilon for all norms. It runs in "
    "transformers, smolseek, mlx-lm and vLLM. `smolseek export` writes a GGUF file of it for llama.cpp.",
    "hf-exact": "It runs in transformers and smolseek only. Other engines do not support the RoPE type `longrope` with "
    "latent attention.",
}


def model_card(source: str, opened: Source, config: ModelConfig, mode: str, command: str, fidelity: str | None) -> str:
    """Return the text of README.md for the model of the configuration `config`, which `command` made from `source`.

    `fidelity` is the result of the verification, or None if the model was not verified.
    """
    path, before = opened.path, opened.config
    license_name, base = _origin(source, path)
    name = base or (path.name if path.exists() else source)
    compressed, counts = mode.startswith("compress"), count(config)
    cache, cache_before = cache_bytes(config)["MLA"], before.num_hidden_layers * before.cache_features * 2
    front = f"license: {license_name}\n" if license_name else ""
    front += f"base_model: {base}\nbase_model_relation: finetune\n" if base else ""
    warning = f"- {UNLIKE_CALIBRATION}.\n" if compressed else ""
    profile = "hf-exact" if config.rope_parameters.rope_type == "longrope" else "portable"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{front}tags:
- deepseek_v3
- mla
- smolseek
---

# {name} as DeepSeek-V3

The weights of {name}, converted from Llama to `DeepseekV3ForCausalLM`. Nothing was trained: the new model
{_CLAIMS[compressed]}

- Mode: {mode}
- Profile: {profile}
- Parameters: {counts.total:,}, {counts.active:,} active per token (original: {count(before).total:,})
- Cache per token in 16 bits: {cache:,} bytes (original: {cache_before:,})
- Licence: {license_name or "that of the original"}
- Measured: {fidelity or "not verified"}
{warning}- Made with: `{command}`

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

It needs no remote code. {_ENGINES[profile]}
Use float32 or bfloat16, never float16: float16 cannot represent the small weights of the latent.
"""


def source_of(folder: Path) -> str | None:
    """Return the SOURCE of the `smolseek convert` command in the model card of `folder`; None without a command."""
    command = re.search(r"^- Made with: `smolseek convert (.*)`$", _read_card(folder), re.M)
    try:
        return shlex.split(command[1])[0] if command else None
    except (ValueError, IndexError):  # the card was edited by hand
        return None


def _read_card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def _origin(source: str, path: Path) -> tuple[str | None, str | None]:
    """Return the licence and the hub name of the source; each is None if unknown."""
    if path.is_file():
        license_name = read_header(path).metadata.get("general.license")
        hub_name = SMOLLM2_HUB if source == "smollm2" else None
        return (license_name if isinstance(license_name, str) else None), hub_name
    hub_name = source if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not Path(source).exists() else None
    front = re.match(r"---\n(.*?)\n---", _read_card(path), re.S)
    license_line = re.search(r"^license:\s*(\S+)\s*$", front[1], re.M) if front else None
    return (license_line[1] if license_line else None), hub_name
