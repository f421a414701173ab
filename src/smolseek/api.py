"""The Python interface: text in, text out.

from smolseek import load

model = load("smollm2")
for piece in model.stream("The structure of DNA"):
    print(piece, end="")
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolseek.device import multiplies_bfloat16
from smolseek.errors import SmolseekError
from smolseek.generate.beam import EarlyStopping, beam_search
from smolseek.generate.engine import Generator, Result
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.text import TextStream
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import LoadedModel, load_causal_lm, load_model, sampling_options
from smolseek.tokenizer import require_known

Message = Mapping[str, str]
"""`{"role": "user" | "assistant" | "system", "content": text}`."""


@dataclass(frozen=True)
class Continuation:
    """What was written after a prompt."""

    prompt: str
    """The prompt."""
    text: str
    """What follows it, without stop strings."""
    result: Result
    """Its tokens, log-probabilities, the reason of its end and the times."""


class Model:
    """A model with its tokenizer, for text. `load` gives one.

    Sampling options are the fields of `smolseek.generate.sampling.SamplingParams`; `bad_words` and `prefix` may be
    given as text here. Those left out are the model's own (`generation_config.json`); its default temperature is 0.8.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        sampling_defaults: Mapping[str, Any] | None = None,
        unrounded: Path | None = None,
    ) -> None:
        """Take what `load_model` gave.

        Args:
            loaded: the model.
            name: what to call it.
            sampling_defaults: fields of `SamplingParams` that the model itself sets.
            unrounded: where its weights are in the file's number format, if those of `loaded` were rounded.

        Raises:
            SmolseekError: for a model without a tokenizer.
        """
        if loaded.tokenizer is None:
            raise SmolseekError(f"{name} has no tokenizer: put its tokenizer.json into the folder, or give --tokenizer")
        self.model, self.tokenizer, self.config = loaded.model, loaded.tokenizer, loaded.config
        self.name, self.sampling_defaults, self._unrounded = name, dict(sampling_defaults or {}), unrounded

    @property
    def number_format(self) -> str:
        """Number format of the weights that write: "float32", "bfloat16" or "float16"."""
        return str(self.model.lm_head.weight.dtype).removeprefix("torch.")

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of `text`, with what the tokenizer itself adds: BOS for many models, nothing for SmolLM2.

        Raises:
            SmolseekError: for a text that UTF-8 cannot hold, or a token that the model does not have.
        """
        return self._encode(text, special=True)

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of `text`, with what the tokenizer itself adds if `special`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SmolseekError(
                f"the text is no UTF-8 at position {error.start:,} ({error.object[error.start]!r}): give it in UTF-8"
            ) from None
        # Not verbose: a text beyond the context is told of once, and by us.
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        require_known(max(ids, default=0), self.tokenizer, self.config.vocab_size)
        return ids

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 100,
        stop: Sequence[str] | str = (),
        stop_tokens: Sequence[str | int] = (),
        max_time: float | None = None,
        **options: Any,
    ) -> TextStream:
        """Continue `prompt`; iterate over the result for the pieces of text as they come.

        Args:
            prompt: text, or tokens.
            max_tokens: new tokens, at most; None goes on to the end of the context.
            stop: text before which to end.
            stop_tokens: tokens that end it besides the model's own, by name ("<|im_end|>") or number.
            max_time: seconds, at most.
            options: fields of `SamplingParams`.

        Raises:
            SmolseekError: for an empty prompt, one beyond the context, an unknown token or a number out of range.
        """
        if "beams" in options:
            raise SmolseekError("beams and streaming do not go together, a search ends at its end: use generate")
        ids, sampling, stop_ids = self._ids(prompt), self.sampling(**options), self.stop_ids(stop_tokens)
        generator = Generator(self.model, [ids], sampling, max_tokens, stop_ids=stop_ids, max_time=max_time)
        return TextStream(generator, self.tokenizer, _strings(stop))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        beams: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        max_tokens: int = 100,
        stop: Sequence[str] | str = (),
        stop_tokens: Sequence[str | int] = (),
        max_time: float | None = None,
        **options: Any,
    ) -> list[Continuation]:
        """Return `n` continuations of each prompt, prompt by prompt; those of beam search best first.

        Draw number j of a prompt has the seed `seed + j`, so the first one is the one that `stream` gives.

        Args:
            prompts: one text or several; they are written in one batch, each as it would be alone.
            n: continuations of each.
            beams: search with so many beams instead of drawing.
            length_penalty: beam search: above 0 favours long continuations.
            early_stopping: beam search: end as soon as `beams` are finished; "never" only when none can get better.
            max_tokens: new tokens, at most.
            stop: text before which to end.
            stop_tokens: tokens that end it besides the model's own.
            max_time: seconds, at most.
            options: fields of `SamplingParams`.

        Raises:
            SmolseekError: as `stream`, and for options that do not go together.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if n < 1:
            raise SmolseekError(f"n {n} is below 1: ask for at least one continuation")
        if not texts:
            return []
        ids = [self._ids(text) for text in texts]
        stops, stop_ids = _strings(stop), self.stop_ids(stop_tokens)
        if beams is not None:
            if stops or max_time is not None:
                raise SmolseekError("beam search takes no stop strings and no max-time: leave them out, or the beams")
            search = functools.partial(
                beam_search,
                self.model,
                beams=beams,
                max_tokens=max_tokens,
                sampling=self.sampling(**{"temperature": 0.0, **options}),
                stop_ids=stop_ids,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                returned=n,
            )
            found = [(text, result) for text, prompt in zip(texts, ids, strict=True) for result in search(prompt)]
            return [Continuation(text, self.tokenizer.decode(result.tokens), result) for text, result in found]
        seed = options.pop("seed", 0)
        samplings = [self.sampling(seed=seed + j, **options) for _ in texts for j in range(n)]
        rows = [prompt for prompt in ids for _ in range(n)]
        generator = Generator(self.model, rows, samplings, max_tokens, stop_ids=stop_ids, max_time=max_time)
        written = zip(TextStream(generator, self.tokenizer, stops).finish(), generator.results, strict=True)
        return [Continuation(texts[row // n], text, result) for row, (text, result) in enumerate(written)]

    def score(self, text: str) -> list[tuple[str, float]]:
        """Return each token of `text` with its log-probability (nats) after those before it; the first has none (nan).

        The numbers are those of the model's own number format. Where `load` chose bfloat16 for writing, the first call
        loads the model a second time.

        Raises:
            SmolseekError: for an empty text, or one beyond the context.
        """
        ids = self._ids(text)
        context = self.config.max_position_embeddings
        if len(ids) > context:
            raise SmolseekError(f"the text has {len(ids)} tokens, the model's context {context}: shorten the text")
        # Not in inference mode, whose kernels are for prompts: these are the numbers of evaluation.
        with torch.no_grad():
            model = self._scoring
            ids_1T = torch.tensor([ids], device=model.lm_head.weight.device)
            hidden_TD, values = model.hidden(ids_1T).hidden_BTD[0, :-1], []
            # In pieces: the logits of a long text would take gigabytes.
            for h_XD, next_X in zip(hidden_TD.split(512), ids_1T[0, 1:].split(512), strict=True):
                logp_XV = model.lm_head(h_XD).float().log_softmax(dim=-1)
                values += logp_XV.gather(1, next_X[:, None])[:, 0].tolist()
        return list(zip((self.tokenizer.decode([i]) for i in ids), [math.nan, *values], strict=True))

    @functools.cached_property
    def _scoring(self) -> CausalLM:
        return self.model if self._unrounded is None else load_causal_lm(self._unrounded)

    def chat(self, messages: Sequence[Message], **options: Any) -> TextStream:
        """Write the answer to a conversation in the model's own chat template; options as in `stream`.

        Raises:
            SmolseekError: for a model without a chat template, messages that it refuses, or as `stream`.
        """
        if not self.tokenizer.chat_template:
            raise SmolseekError(f"{self.name} has no chat template: use generate, or a model made for chatting")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its author's, which may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            system = any(message.get("role") == "system" for message in messages)
            way_out = "leave out the system message" if system else "say it in another way, or use generate"
            raise SmolseekError(
                f"{self.name}: its chat template refuses these messages ({reason}): {way_out}"
            ) from error
        # The template has written BOS itself where the model wants it.
        return self.stream(self._encode(text), **options)

    def sampling(self, **options: Any) -> SamplingParams:
        """Return sampling options, `bad_words` and `prefix` as tokens; those left out are the model's own."""
        if bad := options.get("bad_words"):
            # A word in the middle of a text begins with a space.
            forms = [form for word in _strings(bad) for form in (word, " " + word.lstrip())]
            options["bad_words"] = tuple(tuple(self._encode(form)) for form in forms)
        if isinstance(options.get("prefix"), str):
            options["prefix"] = tuple(self._encode(options["prefix"]))
        try:
            return SamplingParams(**{**self.sampling_defaults, **options})
        except TypeError as error:
            raise SmolseekError(f"unknown sampling option ({error}): see SamplingParams for their names") from None

    def stop_ids(self, tokens: Sequence[str | int] = ()) -> list[int]:
        """Return the tokens that end a text: the model's own, and `tokens` by name or number."""
        found = list(self.config.eos_ids)
        vocabulary = self.tokenizer.get_vocab() if tokens else {}
        for token in tokens:
            number = token if isinstance(token, int) else vocabulary.get(token)
            if number is None or not 0 <= number < self.config.vocab_size:
                raise SmolseekError(f"stop token {token!r} is not in the vocabulary: use --stop for text")
            found.append(number)
        return sorted(set(found))

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if not text:
            raise SmolseekError("the prompt is empty: give at least one word")
        return self.tokens(text)


def _strings(value: Sequence[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def load(name: str, *, dtype: str = "auto", device: str = "cpu", tokenizer: str | None = None) -> Model:
    """Load the model that `name` stands for: a run, a folder, a .gguf file, a hub name or `smollm2`.

    Args:
        name: the model.
        dtype: float32, bfloat16 or float16; auto takes the file's, or bfloat16 where the file has float32 and the CPU
            multiplies bfloat16 (`score` keeps to float32 then).
        device: where it goes, for example "cuda".
        tokenizer: name of another tokenizer than the model's own, for a .gguf file whose tokenizer is not supported.

    Raises:
        SmolseekError: if there is no such model, it is damaged, it has no tokenizer, or its `generation_config.json`
            has settings that are not supported.
    """
    loaded = load_model(name, dtype=dtype, device=device, tokenizer=tokenizer)
    defaults = sampling_options(loaded.path)
    weight = loaded.model.lm_head.weight
    rounds = dtype == "auto" and weight.dtype == torch.float32 and weight.device.type == "cpu"
    if not (rounds and multiplies_bfloat16(weight.device)):
        return Model(loaded, name, defaults)
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.bfloat16()
    return Model(loaded, name, defaults, unrounded=loaded.path)
