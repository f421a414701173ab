"""Writing with a model: `smolseek generate` and `chat`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from smolseek import console
from smolseek.cli.words import parse
from smolseek.errors import SmolseekError


@dataclass(frozen=True)
class GenerateArgs:
    """Continue a prompt; the text appears as it is written."""

    model: str
    """A run folder, a model folder, a .gguf file or `smollm2`."""
    prompt: str
    """Text to continue; `-` reads it from stdin."""
    max_tokens: int = 100
    """Tokens to write, at most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Pick among the k likeliest tokens."""
    top_p: float | None = None
    """Pick among the fewest likeliest tokens that make up this probability."""
    min_p: float | None = None
    """Pick among tokens at least this share as likely as the likeliest."""
    typical_p: float | None = None
    """Pick among the tokens nearest to the expected surprise that make up this probability."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens seen before; 1 is none, 1.1 usual."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens written before."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens written before, once for each time."""
    no_repeat_ngram: int = 0
    """No run of so many tokens comes twice."""
    bad_words: tuple[str, ...] = ()
    """Words never to write."""
    prefix: str = ""
    """Text that the continuation begins with."""
    min_tokens: int = 0
    """No end before so many tokens."""
    stop: tuple[str, ...] = ()
    """Text before which to end."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end the text besides the model's own, by name."""
    max_time: float | None = None
    """Seconds, at most."""
    beams: int | None = None
    """Search with so many beams instead of drawing; the text appears at the end."""
    length_penalty: float = 1.0
    """Beam search: above 0 favours long texts."""
    early_stopping: bool = False
    """Beam search: end as soon as so many texts are finished as there are beams."""
    n: int = 1
    """Continuations to write."""
    greedy: bool = False
    """Take the likeliest token each time, as temperature 0 does."""
    seed: int = 0
    """Seed of the draws."""
    json: bool = False
    """Print a line of JSON for each continuation: text, tokens, log-probabilities, why it ended, times."""
    stats: bool = False
    """Print tokens per second and the size of the cache."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the file's."""


@dataclass(frozen=True)
class ChatArgs:
    """Talk with a model that has a chat template; /help lists the commands."""

    model: str
    """A run folder, a model folder, a .gguf file or `smollm2`."""
    system: str | None = None
    """System message."""
    max_tokens: int = 400
    """Tokens of an answer, at most."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float | None = 0.95
    """Pick among the fewest likeliest tokens that make up this probability."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens seen before; 1 is none, 1.1 usual."""
    seed: int = 0
    """Seed of the draws."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the file's."""


def generate(argv: Sequence[str]) -> None:
    """Carry out `smolseek generate MODEL PROMPT`."""
    args = parse(GenerateArgs, "generate", argv)
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise SmolseekError("the prompt is empty: give some text, or - to read it from stdin")
    names: tuple[str, ...] = (
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    )
    names += ("no_repeat_ngram", "min_tokens", "max_tokens", "bad_words", "prefix", "stop", "stop_tokens", "max_time")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {"temperature": 0.0 if args.greedy else args.temperature, "seed": args.seed}

    import torch

    from smolseek.api import Continuation, load

    model = load(args.model, dtype=args.dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    if args.n == 1 and args.beams is None and not args.json:
        writer = model.stream(prompt, **options)
        console.stream(prompt)
        for piece in writer:
            console.stream(piece)
        console.say()
        found = [Continuation(prompt, "", writer.result)]
    else:
        search = {name: getattr(args, name) for name in ("n", "beams", "length_penalty", "early_stopping")}
        found = model.generate(prompt, **search, **options)
        for number, one in enumerate(found, 1):
            if args.json:
                console.say(json.dumps({"prompt": prompt, "text": one.text, **asdict(one.result)}, ensure_ascii=False))
            else:
                console.say((f"--- {number}\n" if len(found) > 1 else "") + prompt + one.text)
    if args.stats:
        _say_stats([one.result for one in found])


def _say_stats(results: Sequence[Any]) -> None:
    """Say on stderr how fast a call was; the prompt was read once, and its time is in every result."""
    first, written = results[0], sum(len(result.tokens) for result in results)
    seconds = max(result.decode_seconds for result in results)
    reasons = sorted({result.stop_reason for result in results})
    console.complain(
        f"prompt {first.prompt_tokens} tokens, {first.prompt_tokens / max(first.prompt_seconds, 1e-9):,.1f} tokens/s; "
        f"written {written} tokens, {written / max(seconds, 1e-9):,.1f} tokens/s; "
        f"cache {first.cache_bytes:,} bytes; ended by {', '.join(reasons)}"
    )


def chat(argv: Sequence[str]) -> None:
    """Carry out `smolseek chat MODEL`."""
    args = parse(ChatArgs, "chat", argv)
    import torch

    from smolseek.api import load
    from smolseek.chat import Chat, talk

    strategy = {name: getattr(args, name) for name in ("temperature", "top_p", "repetition_penalty", "seed")}
    model = load(args.model, dtype=args.dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    talk(Chat(model, strategy, args.max_tokens, args.system))
