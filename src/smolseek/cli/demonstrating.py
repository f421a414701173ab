"""Command `smolseek demo`, which shows the main commands from end to end, without a network."""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolseek import console
from smolseek.cli import models, training, writing
from smolseek.cli.arguments import parse
from smolseek.config import option
from smolseek.errors import SmolseekError
from smolseek.gguf_tokenizer import smollm2_gguf

TOLERANCE = 1e-4
"""Largest difference between our logits and those of stock transformers, both in float32."""


@dataclass(frozen=True)
class DemoArgs:
    """Convert SmolLM2 exactly, train a small model, and write text with both.

    The demo takes three to ten minutes on two CPU cores.
    """

    out: str = "smolseek-demo"
    """Folder for the two models: OUT/smollm2-deepseek and OUT/demo, which must not exist."""
    steps: int = option(300, least=4)
    """Training steps of the small model."""


def demo(argv: Sequence[str]) -> None:
    """Carry out `smolseek demo`."""
    args = parse(DemoArgs, "demo", argv)
    converted, trained = (os.path.join(args.out, name) for name in ("smollm2-deepseek", "demo"))
    for path in (converted, trained):
        if os.path.lexists(path):
            raise SmolseekError(f"{path} exists: delete it, or choose another folder with --out")
    if smollm2_gguf() is not None:  # otherwise the weights come from the hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quarter = args.steps // 4
    options = (
        f"--data builtin --data.val-fraction 0.05 --run {shlex.quote(trained)} --steps {args.steps} "
        f"--eval-every {quarter} --log-every {max(1, quarter // 4)}"
    )
    console.say("== SmolLM2-135M-Instruct's weights become a DeepSeek-V3 model, with nothing lost")
    _run(models.convert, "convert", "smollm2", converted)
    _say_all(compare_with_transformers(converted))
    _say_all(continue_prompts(converted))
    console.say()
    console.say("== A small DeepSeek model trained from scratch on the English of the running Python")
    _run(training.train, "train", "tiny", *shlex.split(options))
    sampling = ("--max-tokens", "40", "--temperature", "0.7")
    _run(writing.generate, "generate", trained, "The function returns", *sampling)
    _say_all(compare_with_transformers(trained))
    console.say()
    console.say(f"Next: smolseek chat {shlex.quote(converted)}, smolseek report {shlex.quote(trained)}")


def _run(command: Callable[[Sequence[str]], None], verb: str, *arguments: str) -> None:
    console.say()
    console.say(f"$ smolseek {shlex.join((verb, *arguments))}")
    command(arguments)


def _say_all(lines: Iterator[str]) -> None:
    console.say()
    for line in lines:
        console.say(line)


def compare_with_transformers(name: str) -> Iterator[str]:
    """Open the model `name` with stock transformers, compare its logits with ours, and yield two lines about it.

    Raises:
        SmolseekError: if transformers cannot open the model, or if its logits differ.
    """
    import torch

    from smolseek.storage.hf_folder import load_model
    from smolseek.storage.stock_transformers import open_with_transformers

    ours = load_model(name)
    assert ours.tokenizer is not None
    theirs = open_with_transformers(Path(ours.path), torch.float32, name, "report this as a bug of smolseek")
    ids = torch.tensor([ours.tokenizer("A function is an object that can be called.")["input_ids"]])
    with torch.no_grad():
        logits, expected = ours.model(ids), theirs(ids).logits
    difference, deviation = float((logits - expected).abs().max()), float(expected.std())
    yield f"{ours.path} opens in transformers as {type(theirs).__name__}"
    yield f"largest difference of the logits: {difference:.1e} (their standard deviation is {deviation:.2f})"
    if not difference <= TOLERANCE:
        raise SmolseekError(f"the logits differ by {difference:.1e}, more than {TOLERANCE:g}: report this as a bug")


def continue_prompts(name: str) -> Iterator[str]:
    """Yield greedy continuations by 40 tokens of the five prompts of the original experiment, each in one line."""
    from smolseek.api import load
    from smolseek.train.samples import PROMPTS

    model = load(name, dtype="float32")  # the same text on every processor
    for prompt in PROMPTS:
        (one,) = model.generate(prompt, max_tokens=40, temperature=0)
        yield f"> {prompt}{one.text.replace(chr(10), ' ')} ..."
