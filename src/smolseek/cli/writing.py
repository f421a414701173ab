"""Writing with a model: `smolseek generate` and `chat`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from smolseek import console
from smolseek.cli.arguments import option, parse
from smolseek.errors import SmolseekError
from smolseek.sampling_options import SamplingOptions

if TYPE_CHECKING:
    from smolseek.api import Model


@dataclass(frozen=True, kw_only=True)
class _ModelArgs(SamplingOptions):
    model: str
    """A run folder, a model folder, a .gguf file or `smollm2`."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own, for a .gguf file whose tokenizer is not supported."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto takes the file's, or bfloat16 for float32 where the CPU multiplies that."""

    def load(self) -> "Model":
        """Load the model onto the GPU, where there is one."""
        import torch

        from smolseek.api import load

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load(self.model, dtype=self.dtype, device=device, tokenizer=self.tokenizer)

    def sampling(self, argv: Sequence[str], model: "Model") -> dict[str, Any]:
        """Return the sampling options in `argv`; the verb's defaults fill in what neither it nor the model sets."""
        spelt = {f.name: (f"--{f.name}", f"--{f.name.replace('_', '-')}") for f in fields(SamplingOptions)}
        given = {name for name, options in spelt.items() if any(option(argv, word) is not None for word in options)}
        return {name: getattr(self, name) for name in spelt if name in given or name not in model.sampling_defaults}


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(_ModelArgs):
    """Continue a prompt; the text appears as it is written."""

    prompt: str
    """Text to continue; `-` reads it from stdin."""
    max_tokens: int = 100
    """Tokens to write, at most."""
    greedy: bool = False
    """Take the likeliest token each time, as temperature 0 does."""
    bad_words: tuple[str, ...] = ()
    """Words never to write."""
    prefix: str = ""
    """Text that the continuation begins with."""
    stop: tuple[str, ...] = ()
    """Text before which to end."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end the text besides the model's own, by name."""
    max_time: float | None = None
    """Seconds, at most."""
    n: int = 1
    """Continuations to write."""
    beams: int | None = None
    """Search with so many beams instead of drawing; the text appears at the end."""
    length_penalty: float = 1.0
    """Beam search: above 0 favours long texts."""
    early_stopping: bool = False
    """Beam search: end as soon as so many texts are finished as there are beams."""
    json: bool = False
    """Print a line of JSON for each continuation: text, tokens, log-probabilities, why it ended, times."""
    stats: bool = False
    """Print tokens per second, the number format and the size of the cache."""


@dataclass(frozen=True, kw_only=True)
class ChatArgs(_ModelArgs):
    """Talk with a model that has a chat template; /help lists the commands."""

    system: str | None = None
    """System message."""
    max_tokens: int = 400
    """Tokens of an answer, at most."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float | None = 0.95
    """Keep the fewest likeliest tokens that make up this probability (1904.09751)."""


def generate(argv: Sequence[str]) -> None:
    """Carry out `smolseek generate MODEL PROMPT`."""
    args = parse(GenerateArgs, "generate", argv)
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise SmolseekError("the prompt is empty: give some text, or - to read it from stdin")
    from smolseek.api import Continuation

    model = args.load()
    options = args.sampling(argv, model) | ({"temperature": 0.0} if args.greedy else {})
    options |= {name: getattr(args, name) for name in ("max_tokens", "prefix", "stop", "stop_tokens", "max_time")}
    options |= {"bad_words": args.bad_words} if args.bad_words else {}
    if args.n == 1 and args.beams is None and not args.json:
        stream = model.stream(prompt, **options)
        console.stream(prompt)
        for piece in stream:
            console.stream(piece)
        console.say()
        found = [Continuation(prompt, "", stream.result)]
    else:
        search = {name: getattr(args, name) for name in ("n", "beams", "length_penalty", "early_stopping")}
        found = model.generate(prompt, **search, **options)
        for number, one in enumerate(found, 1):
            if args.json:
                console.say(json.dumps({"prompt": prompt, "text": one.text, **asdict(one.result)}, ensure_ascii=False))
            else:
                console.say((f"--- {number}\n" if len(found) > 1 else "") + prompt + one.text)
    if args.stats:
        _say_stats([one.result for one in found], model.number_format)


def _say_stats(results: Sequence[Any], number_format: str) -> None:
    """Say on stderr how fast a call was; the prompt was read once, and its time is in every result."""
    first, written = results[0], sum(len(result.tokens) for result in results)
    seconds = max(result.decode_seconds for result in results)
    reasons = sorted({result.stop_reason for result in results})
    console.complain(
        f"prompt {first.prompt_tokens} tokens, {first.prompt_tokens / max(first.prompt_seconds, 1e-9):,.1f} tokens/s; "
        f"written {written} tokens, {written / max(seconds, 1e-9):,.1f} tokens/s; "
        f"{number_format}; cache {first.cache_bytes:,} bytes; ended by {', '.join(reasons)}"
    )


def chat(argv: Sequence[str]) -> None:
    """Carry out `smolseek chat MODEL`."""
    args = parse(ChatArgs, "chat", argv)
    from smolseek.chat import Chat, talk

    model = args.load()
    talk(Chat(model, args.sampling(argv, model), args.max_tokens, args.system))
