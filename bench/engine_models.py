"""The models that bench/engines.py holds other engines to, made once in build/engines/models."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from smolseek.config import ModelConfig
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import deepseek_159m, tiny
from smolseek.storage.hf_folder import load_model, save_folder
from smolseek.storage.target import resolve
from smolseek.tokenizer import load_tokenizer


def smolseek(*arguments: str) -> None:
    """Run a command of smolseek; what it prints is shown only if it fails."""
    done = subprocess.run([sys.executable, "-m", "smolseek", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: smolseek {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def smolseek_running(*arguments: str) -> Iterator[subprocess.Popen]:
    """Start a command of smolseek, which is terminated in the end."""
    command = [sys.executable, "-m", "smolseek", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


def spread_logits(model: CausalLM, seed: int) -> None:
    """Draw weights anew, so that every layer matters and the logits have a standard deviation of about 3.

    An expert adds less than attention does: rounding sometimes changes the choice of the last expert, and that must not
    change the text.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:  # a norm's weight
            values = 1 + 0.2 * values
            if (
                name == "model.norm.weight"
            ):  # with a tied head and positive weights, the likeliest token is the last one
                values *= torch.randn(parameter.shape, generator=generator).sign()
        elif "embed_tokens" in name or "lm_head" in name:
            values *= 3 * hidden**-0.5
        else:
            values *= parameter.shape[-1] ** -0.5
            if "o_proj" in name or "down_proj" in name:  # as large as the embedding, all layers together
                values *= (0.3 if "experts" in name else 3) * (hidden * layers) ** -0.5
        parameter.data.copy_(values)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def random(config: ModelConfig, folder: Path) -> None:
    model = new_model(config)
    spread_logits(model, seed=0)
    save_folder(model, folder, load_tokenizer("smollm2"))


def trained(folder: Path, steps: int, *options: str) -> None:
    length = ["--steps", str(steps), "--eval-tokens", "4096", "--sample-tokens", "10"]
    smolseek("train", "tiny", "--data", "builtin", "--run", str(folder), *length, *options)


WIDER = ("--model.kv-lora-rank", "64", "--model.qk-nope-head-dim", "32")


def half_cache(folder: Path) -> None:
    options = ["--mode", "compress", "--cache", "0.5", "--profile", "portable"]
    smolseek("convert", "smollm2", str(folder), *options)


def original(folder: Path) -> None:
    loaded = load_model("smollm2")
    save_folder(loaded.model, folder, loaded.tokenizer)


def with_query_compression(config: ModelConfig, rank: int) -> ModelConfig:
    return replace(config, q_lora_rank=rank)


def dense(config: ModelConfig) -> ModelConfig:
    return replace(config, n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0)


@dataclass(frozen=True)
class JudgedModel:
    """One model, and how it is made."""

    description: str
    make: Callable[[Path], None]


MODELS = {
    "tiny": JudgedModel("a checkpoint of a training run: experts, tied head", lambda folder: trained(folder, 60)),
    # Blocks of 32 numbers do not fit the 16 and 48 features of tiny.
    "tiny_64": JudgedModel("the same with other sizes, trained longer", lambda folder: trained(folder, 200, *WIDER)),
    "deepseek_159m": JudgedModel(
        "experts, random weights", lambda folder: random(replace(deepseek_159m(), max_position_embeddings=8192), folder)
    ),
    "moe_query": JudgedModel(
        "experts, query compression, random weights",
        lambda folder: random(with_query_compression(tiny(), 64), folder),
    ),
    "dense_query": JudgedModel(
        "dense, query compression, random weights",
        lambda folder: random(with_query_compression(dense(tiny()), 64), folder),
    ),
    "half_cache": JudgedModel("SmolLM2-135M-Instruct with half of its cache", half_cache),
    "smollm2": JudgedModel("SmolLM2-135M-Instruct itself, a Llama", original),
}


def model_folder(name: str, root: Path) -> Path:
    """Return the folder of the model called `name` below `root`, which is made where it is missing."""
    folder = root / name
    if not folder.exists():
        print(f"making {name}: {MODELS[name].description}", flush=True)
        root.mkdir(parents=True, exist_ok=True)
        MODELS[name].make(folder)
    return resolve(folder)
