"""Commands `smolseek generate` and `chat`, which generate text."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from smolseek import console
from smolseek.cli.arguments import option_value, parse, renamed
from smolseek.config import ALIASES, GenerationOptions, SamplingOptions, option
from smolseek.errors import SmolseekError

if TYPE_CHECKING:
    from smolseek.api import Model


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The model of a command that generates text."""

    model: str
    """A run folder, a model folder, a hub name, a .gguf file or `smollm2`."""
    tokenizer: str | None = None
    """Another tokenizer, for a .gguf file with a tokenizer that is not supported."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0", "q4_0", "q4_1"] = "auto"
    """Number format of the weights. q8_0, q4_0 and q4_1 quantise the matrices, for a CPU. auto is the format of the
    file, but bfloat16 instead of float32 if the CPU has AVX512_BF16."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto is cuda if there is a CUDA device, else cpu. mps is the GPU of an Apple computer."""

    def load(self) -> "Model":
        """Load the model onto its device."""
        from smolseek.api import load
        from smolseek.device import select

        return load(self.model, dtype=self.dtype, device=str(select(self.device)), tokenizer=self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class GenerateArgs(ModelArgs, GenerationOptions):
    """Continue a prompt and print the text as it is generated."""

    prompt: str
    """Text to continue; `-` reads the text from stdin."""
    greedy: bool = False
    """Greedy decoding, the same as --temperature 0."""
    json: bool = False
    """Print one line of JSON for each continuation, with text, tokens, log-probabilities, stop reason and times."""
    stats: bool = False
    """Print tokens per second, the number format and the size of the KV cache to stderr."""


@dataclass(frozen=True, kw_only=True)
class ChatArgs(ModelArgs, SamplingOptions):
    """Chat with a model that has a chat template; /help lists the commands."""

    system: str | None = None
    """System message."""
    max_tokens: int = option(400, least=1)
    """Largest number of tokens in an answer."""
    temperature: float = option(0.7, least=0)
    top_p: float | None = option(0.95, above=0, most=1)


def generate(argv: Sequence[str]) -> None:
    """Carry out `smolseek generate MODEL PROMPT`."""
    argv = renamed(argv, ALIASES)
    args = parse(GenerateArgs, "generate", argv)
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise SmolseekError("the prompt is empty: give some text, or - to read it from stdin")
    from smolseek.api import Continuation

    model = args.load()
    options = _options(args, argv, model) | ({"temperature": 0.0} if args.greedy else {})
    if args.n == 1 and args.beams == 1 and not args.json:
        stream = model.stream(prompt, **options)
        console.stream(prompt)
        for text in stream:
            console.stream(text)
        console.say()
        continuations = [Continuation(prompt, "", stream.result)]
    else:
        continuations = model.generate(prompt, **options)
        for number, one in enumerate(continuations, 1):
            if args.json:
                record = {"prompt": prompt, "text": one.text, **asdict(one.result)}
                text = json.dumps(record, ensure_ascii=False)
            else:
                text = (f"--- {number}\n" if len(continuations) > 1 else "") + prompt + one.text
            console.stream(f"{text}\n")
    if args.stats:
        _say_stats([one.result for one in continuations], model.number_format)


def _options(args: GenerateArgs | ChatArgs, argv: Sequence[str], model: "Model") -> dict[str, Any]:
    """Return the options in `argv`. For options that neither `argv` nor the model sets, use the command's defaults."""
    names = {field.name for field in fields(GenerationOptions)} & {field.name for field in fields(args)}
    names -= {name for name in model.sampling_defaults if option_value(argv, f"--{name.replace('_', '-')}") is None}
    return {name: getattr(args, name) for name in names}


def _say_stats(results: Sequence[Any], number_format: str) -> None:
    """Print the speed of a call to stderr. All results share the time of reading the prompt."""
    first, generated = results[0], sum(len(result.tokens) for result in results)
    seconds = max(result.decode_seconds for result in results)
    console.to_stderr(
        f"prompt {first.prompt_tokens} tokens, {first.prompt_tokens / max(first.prompt_seconds, 1e-9):,.1f} tokens/s; "
        f"generated {generated} tokens, {generated / max(seconds, 1e-9):,.1f} tokens/s; {number_format}"
    )
    reasons = ", ".join(sorted({result.stop_reason for result in results}))
    console.to_stderr(f"cache {first.cache_bytes:,} bytes; stop reason: {reasons}")


def chat(argv: Sequence[str]) -> None:
    """Carry out `smolseek chat MODEL`."""
    argv = renamed(argv, ALIASES)
    args = parse(ChatArgs, "chat", argv)
    from smolseek.chat import Chat, talk

    model = args.load()
    talk(Chat(model, _options(args, argv, model), args.system))
