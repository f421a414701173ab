"""Makes the model card of an exported model: README.md with the front matter that the hub reads."""

import re
from pathlib import Path

from smolseek.config import ModelConfig
from smolseek.errors import SmolseekError
from smolseek.model.summary import count
from smolseek.report.page import tiles
from smolseek.report.read import Run, read_run
from smolseek.run_folder import step_of

_FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.S)
_INHERITED = re.compile(
    r"^(?:license|license_name|license_link|base_model|base_model_relation):.*\n(?:[ \t-].*\n)*", re.M
)
"""Settings of the source's front matter that the new card keeps, with the list items in the lines after a setting."""
_RUN = "## How to run it"
_OLD_USAGE = re.compile(rf'^(?:{_RUN}|```python\n(?:.*\n){{2}}model = .*"FOLDER")', re.M)
"""Beginning of the instructions that an earlier export or conversion wrote. The new instructions replace the earlier
instructions."""


def model_card(path: Path, config: ModelConfig, name: str, *, license_name: str | None, gguf: str | None) -> str:
    """Return the text of README.md for the model from `path`, a model folder, checkpoint or .gguf file.

    Args:
        path: where the model came from. The card of a converted model is kept; for a run, its results are added.
        config: configuration of the exported model.
        name: the model's title, for example its name on the hub.
        license_name: licence in the hub's spelling; None takes the licence in the card of `path`, if any.
        gguf: name of the GGUF file; None for a Hugging Face folder.
    """
    old = _read(path)
    front, body = _split(old)
    run = _run_of(path)
    if run is not None:
        init = run.config.init
        front, body = _split(_read(Path(init))) if init else ("", "")
        body = _trained(run, path, config, name)
    elif not body:
        body = f"# {name}\n\nExported by smolseek. How it was made is not recorded.\n\n{_sizes(config)}"
    body = _OLD_USAGE.split(body, maxsplit=1)[0].rstrip()
    return f"---\n{_front(front, config, license_name, gguf)}---\n\n{body}\n\n{_usage(config, name, gguf)}"


def obstacle(config: ModelConfig) -> str | None:
    """Return why vLLM and mlx-lm cannot compute a model; None if they can be expected to compute it."""
    if config.model_type == "smolseek_gqa_moe":
        return "its model_type is smolseek_gqa_moe"
    if config.is_mla and config.rope_parameters.rope_type != "default":
        return f"its RoPE is of the type {config.rope_parameters.rope_type}"
    if config.is_mla and config.qk_nope_head_dim == 0:
        return "its heads have no features without RoPE (qk_nope_head_dim 0)"
    return None


def _read(path: Path) -> str:
    card = path / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if path.is_dir() and card.is_file() else ""


def _split(card: str) -> tuple[str, str]:
    """Return the front matter and the text of a card."""
    match = _FRONT.match(card)
    return (match[1], card[match.end() :].strip()) if match else ("", card.strip())


def _front(front: str, config: ModelConfig, license_name: str | None, gguf: str | None) -> str:
    """Return the front matter: licence and base model from the source's card, and tags for the hub's filters."""
    inherited = [match[0].rstrip() for match in _INHERITED.finditer(front)]
    if license_name is not None:
        others = (setting for setting in inherited if not setting.startswith("license"))
        inherited = [f"license: {license_name}", *others]
    library = "gguf" if gguf else "transformers"
    tags = [config.model_type, *(["mla"] if config.is_mla else []), *(["gguf"] if gguf else []), "smolseek"]
    lines = [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        *inherited,
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "".join(f"{line}\n" for line in lines)


def _run_of(path: Path) -> Run | None:
    """Return the training run that wrote the checkpoint `path`; None without a run, or if nothing was logged."""
    if path.parent.name != "checkpoints" or re.fullmatch(r"step-\d+", path.name) is None:
        return None
    try:
        return read_run(path.parent.parent)
    except SmolseekError:
        return None


def _trained(run: Run, path: Path, config: ModelConfig, name: str) -> str:
    """Return the text about a trained model: its data, its size, and the results at the exported step."""
    step = step_of(path)
    run.training[:] = [record for record in run.training if record["step"] <= step] or run.training[:1]
    run.validation[:] = [record for record in run.validation if record["step"] <= step]
    figures = "\n".join(f"| {what} | {value} |" for what, value in tiles(run))
    c = run.config
    audit = run.audits.get("end") if step >= c.steps else None
    verdict = "not audited at this step"
    if audit is not None:
        counts = audit["audit_counts"]
        verdict = ", ".join(
            f"{n} checks {what}"
            for what, n in (("passed", counts["pass"]), ("failed", counts["fail"]), ("skipped", counts["skip"]))
        )
    begun = f"the weights of {_published(c.init)}" if c.init else "random weights"
    goal = f"the distribution of {_published(c.distill.teacher)}" if c.distill.teacher else "the next token"
    return f"""# {name}

Trained by smolseek from {begun}, for {step:,} of {c.steps:,} steps, to predict {goal}.

- Data: {", ".join(map(_published, c.data.sources))}
- Tokens per step: {c.step_tokens:,} ({c.batch_size} x {c.grad_accum} x {c.seq_len})
- Audit of the run: {verdict}
{_sizes(config)}

| Figure | Value |
|---|---|
{figures}

The losses are in nats per token. The validation text comes from the same data and was not trained on."""


def _published(source: str) -> str:
    """Return the name of a file, folder or hub source without its path, because a model card may be public."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or path.exists() else source


def _sizes(config: ModelConfig) -> str:
    counts, cached = count(config), 2 * config.num_hidden_layers * config.cache_features
    return (
        f"- Parameters: {counts.total:,}, {counts.active:,} active per token\n"
        f"- KV cache per token in 16 bits: {cached:,} bytes"
    )


def _usage(config: ModelConfig, name: str, gguf: str | None) -> str:
    """Return the part of the card that says how to run the model in each engine that supports it."""
    if gguf:
        return f"""{_RUN}

```
llama-cli -m {gguf} -p "The structure of DNA"
smolseek generate {gguf} "The structure of DNA"
```
"""
    if config.model_type == "smolseek_gqa_moe":
        return f'{_RUN}\n\n```\nsmolseek generate {name} "The structure of DNA"\n```\n\nNo other engine computes it.\n'
    text = f"""{_RUN}

With transformers, without remote code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With smolseek: `smolseek generate {name} "The structure of DNA"`.
"""
    if config.is_mla and not config.latent_norm:
        text += "\nUse float32 or bfloat16, never float16: float16 cannot represent the small weights of the latent.\n"
    if why := obstacle(config):
        return text + f"\nNot for other engines, because {why}.\n"
    text += f'\nWith mlx-lm: `mlx_lm.generate --model {name} --prompt "The structure of DNA"`.\n'
    flag = " On a CPU, set VLLM_MLA_DISABLE=1 and give `-cc.custom_ops+=none`." if config.is_mla else ""
    return text + f"\nWith vLLM: `vllm serve {name}`.{flag}\n"
