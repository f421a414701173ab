"""The Python interface: text in, text out.

from smolseek import load

model = load("smollm2")
for piece in model.stream("The structure of DNA"):
    print(piece, end="")
"""

import functools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from smolseek.config import GenerationOptions, Options, SamplingOptions, generation_options, token_ids
from smolseek.device import capability
from smolseek.errors import SmolseekError
from smolseek.generate.beam import beam_search
from smolseek.generate.engine import Generator, Result
from smolseek.generate.request import Request
from smolseek.generate.sampling import Processor, SamplingParams
from smolseek.generate.scheduled import ScheduledSequence
from smolseek.generate.scheduler import Scheduler
from smolseek.generate.text import TextStream
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import LoadedModel, load_causal_lm, load_model, sampling_options
from smolseek.storage.quantized import QUANTIZATIONS, number_format
from smolseek.tokenizer import require_known

Message = Mapping[str, str]
"""A message of a chat: `{"role": "user" | "assistant" | "system", "content": text}`."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and the text generated after it."""

    prompt: str
    """Text of the prompt; a prompt of token ids is decoded."""
    text: str
    """The generated text, without the stop string."""
    result: Result
    """Tokens, log-probabilities, stop reason and times."""


class Model:
    """A model with its tokenizer; `load` returns one.

    Options of `generate`, `stream` and `chat` are the fields of `smolseek.config.GenerationOptions`. The names that
    transformers uses (`max_new_tokens`, `num_beams`) work, too. Defaults come from the model's
    `generation_config.json`.

    Args:
        loaded: the model, as `load_model` returns it.
        name: the name of the model in messages.
        sampling_defaults: fields of `SamplingParams` that the model's `generation_config.json` sets.
        unrounded: path of the original weights, if the weights of `loaded` were rounded to another number format.

    Raises:
        SmolseekError: for a model without a tokenizer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        sampling_defaults: Mapping[str, Any] | None = None,
        unrounded: Path | None = None,
    ) -> None:
        if loaded.tokenizer is None:
            raise SmolseekError(f"{name} has no tokenizer: put its tokenizer.json into the folder, or give --tokenizer")
        self.model, self.tokenizer, self.config = loaded.model, loaded.tokenizer, loaded.config
        self.name, self.sampling_defaults, self._unrounded = name, dict(sampling_defaults or {}), unrounded

    @property
    def number_format(self) -> str:
        """Number format of most weights: "float32", "bfloat16", "float16", "q8_0", "q4_0" or "q4_1"."""
        return number_format(self.model)

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`. If `special` is set, the tokenizer's special tokens, such as BOS, are added.

        Raises:
            SmolseekError: for an empty text, a text that UTF-8 cannot encode, or a token beyond the model's vocabulary.
        """
        if special and not text:
            raise SmolseekError("the prompt is empty: give at least one word")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise SmolseekError(
                f"the text is not UTF-8 at position {error.start:,} ({error.object[error.start]!r}): encode it in UTF-8"
            ) from None
        # Not verbose, because our own error reports a text beyond the context.
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        require_known(max(ids, default=0), self.tokenizer, self.config.vocab_size)
        return ids

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        processors: Sequence[Processor] = (),
        scheduler: Scheduler | None = None,
        **options: Unpack[Options],
    ) -> TextStream:
        """Continue `prompt`; iterate over the result to get the text piece by piece.

        Args:
            prompt: text, or token ids.
            processors: functions that change the logits, as transformers' `LogitsProcessor`.
            scheduler: a scheduler of this model without other requests. It does not read again what it has cached, such
                as the earlier turns of a chat. The first piece of text then raises the errors of the prompt.
            options: fields of `GenerationOptions`.

        Raises:
            SmolseekError: for a prompt that is empty or beyond the context, an unknown token or a number out of range.
        """
        chosen = generation_options(options, self.sampling_defaults)
        if chosen.beams != 1 or chosen.n != 1:
            raise SmolseekError(
                "stream returns only one text and has no beam search: use generate for beams or n above 1"
            )
        ids, sampling = self._ids(prompt), self.sampling_params(chosen, processors)
        if scheduler is None:
            return TextStream(self._generator([ids], [sampling], chosen), self.tokenizer, chosen.stop)
        request = Request(
            prompt=tuple(ids),
            sampling=sampling,
            max_tokens=chosen.max_tokens,
            stop_ids=frozenset(self.stop_ids(chosen.stop_tokens)),
            deadline=None if chosen.max_time is None else time.monotonic() + chosen.max_time,
        )
        return TextStream(ScheduledSequence(scheduler, request), self.tokenizer, chosen.stop)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        processors: Sequence[Processor] = (),
        **options: Unpack[Options],
    ) -> list[Continuation]:
        """Return `n` continuations of each prompt, in the order of the prompts; with beam search, the best text first.

        Continuation number j of a prompt is sampled with the seed `seed + j`, so number 0 is the text of `stream`.

        Args:
            prompts: one or several texts, or lists of token ids. Several prompts are computed as one batch, in which
                each prompt gets the same text as alone.
            processors: functions that change the logits, as transformers' `LogitsProcessor`.
            options: fields of `GenerationOptions`.

        Raises:
            SmolseekError: as `stream`, and for options that cannot be combined.
        """
        chosen = generation_options(options, self.sampling_defaults)
        all_prompts: Any = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(all_prompts, Iterable):
            raise SmolseekError(f"prompts {all_prompts!r} is neither a text nor a list of prompts: give one of these")
        all_prompts = list(all_prompts)
        if not all_prompts:
            return []
        ids, sampling = [self._ids(prompt) for prompt in all_prompts], self.sampling_params(chosen, processors)
        prompts_and_ids = zip(all_prompts, ids, strict=True)
        texts = [prompt if isinstance(prompt, str) else self.tokenizer.decode(of) for prompt, of in prompts_and_ids]
        if chosen.beams != 1:
            results = [self._search(prompt, sampling, chosen) for prompt in ids]
            best = [(text, result) for text, of_text in zip(texts, results, strict=True) for result in of_text]
            return [Continuation(text, self.tokenizer.decode(result.tokens), result) for text, result in best]
        samplings = [replace(sampling, seed=sampling.seed + j) for _ in texts for j in range(chosen.n)]
        generator = self._generator([prompt for prompt in ids for _ in range(chosen.n)], samplings, chosen)
        outputs = zip(TextStream(generator, self.tokenizer, chosen.stop).finish(), generator.results, strict=True)
        return [Continuation(texts[number // chosen.n], *output) for number, output in enumerate(outputs)]

    def score(self, text: str) -> list[tuple[str, float]]:
        """Return each token of `text` with its log-probability in nats, given the previous tokens; nan for the first.

        The score is computed in the file's number format. If `load` has rounded float32 weights to bfloat16, the first
        call of `score` loads the float32 weights again.

        Raises:
            SmolseekError: for a text that is empty or beyond the context.
        """
        ids = self.tokens(text)
        context = self.config.max_position_embeddings
        if len(ids) > context:
            raise SmolseekError(
                f"the text has {len(ids)} tokens, but the model's context is {context}: shorten the text"
            )
        # Inference mode is not used, because its kernels round differently than those of evaluation.
        with torch.no_grad():
            model = self._scoring
            ids_1T = torch.tensor([ids], device=model.lm_head.weight.device)
            hidden_TD, values = model.hidden(ids_1T).hidden_BTD[0, :-1], []
            # The logits are computed in chunks, since those of a long text take gigabytes.
            for h_XD, next_X in zip(hidden_TD.split(512), ids_1T[0, 1:].split(512), strict=True):
                logp_XV = model.lm_head(h_XD).float().log_softmax(dim=-1)
                values += logp_XV.gather(1, next_X[:, None])[:, 0].tolist()
        return list(zip((self.tokenizer.decode([i]) for i in ids), [math.nan, *values], strict=True))

    @functools.cached_property
    def _scoring(self) -> CausalLM:
        return self.model if self._unrounded is None else load_causal_lm(self._unrounded)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        processors: Sequence[Processor] = (),
        scheduler: Scheduler | None = None,
        **options: Unpack[Options],
    ) -> TextStream:
        """Generate the assistant's answer to `messages`, with the model's chat template and the arguments of `stream`.

        Raises:
            SmolseekError: as `stream`, for a model without a chat template, and for messages that the template refuses.
        """
        return self.stream(self.chat_tokens(messages), processors=processors, scheduler=scheduler, **options)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to the beginning of the assistant's answer.

        Raises:
            SmolseekError: for a model without a chat template, and for messages that the template refuses.
        """
        if not self.tokenizer.chat_template:
            raise SmolseekError(f"{self.name} has no chat template: use generate, or a chat model")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is code, which may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            system = any(message.get("role") == "system" for message in messages)
            hint = "leave out the system message" if system else "change the messages, or use generate"
            raise SmolseekError(f"{self.name}: its chat template rejects these messages ({reason}): {hint}") from error
        # The template itself adds BOS if the model needs it.
        return self.tokens(text, special=False)

    def stop_ids(self, tokens: Sequence[str | int] = ()) -> list[int]:
        """Return the ids of the tokens that end a text: the model's end tokens, and `tokens`, given by name or id."""
        ids = list(self.config.eos_ids)
        vocabulary = self.tokenizer.get_vocab() if tokens else {}
        for token in tokens:
            number = token if isinstance(token, int) else vocabulary.get(token)
            if number is None or not 0 <= number < self.config.vocab_size:
                raise SmolseekError(f"stop token {token!r} is not in the vocabulary: use the option stop for strings")
            ids.append(number)
        return sorted(set(ids))

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokens(prompt) if isinstance(prompt, str) else token_ids(prompt)
        if ids is None:
            shown = " ".join(repr(prompt).split())[:80]
            raise SmolseekError(f"prompt {shown} is neither a text nor a list of token ids: give one of these")
        return list(ids)

    def sampling_params(self, chosen: GenerationOptions, processors: Sequence[Processor] = ()) -> SamplingParams:
        """Return the options of sampling, with texts converted to token ids.

        Raises:
            SmolseekError: for a token id in `prefix` or `bad_words` that is not in the vocabulary.
        """
        bad_words: Sequence[Any] = chosen.bad_words  # texts, or token ids as in generation_config.json
        # In the middle of a text, a word has other tokens, because they include the space before the word.
        forms = [
            form for word in bad_words for form in ((word, " " + word.lstrip()) if isinstance(word, str) else (word,))
        ]
        ids = [self.tokens(form, special=False) if isinstance(form, str) else form for form in (*forms, chosen.prefix)]
        vocabulary = self.config.vocab_size
        wrong = next((i for word in ids for i in word if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise SmolseekError(
                f"token id {wrong} is not among the model's {vocabulary} tokens: remove it from prefix or bad words"
            )
        return SamplingParams(
            **{field.name: getattr(chosen, field.name) for field in fields(SamplingOptions)},
            bad_words=tuple(map(tuple, ids[:-1])),
            prefix=tuple(ids[-1]),
            processors=tuple(processors),
        )

    def _generator(
        self, prompts: list[list[int]], samplings: list[SamplingParams], chosen: GenerationOptions
    ) -> Generator:
        stop_ids = self.stop_ids(chosen.stop_tokens)
        return Generator(self.model, prompts, samplings, chosen.max_tokens, stop_ids=stop_ids, max_time=chosen.max_time)

    def _search(self, prompt: list[int], sampling: SamplingParams, chosen: GenerationOptions) -> list[Result]:
        if chosen.stop or chosen.prefix or chosen.max_time is not None:
            raise SmolseekError(
                "beam search does not support stop strings, prefix or max-time: remove these options or beams"
            )
        context = self.config.max_position_embeddings
        return beam_search(
            self.model,
            prompt,
            beams=chosen.beams,
            max_tokens=context if chosen.max_tokens is None else chosen.max_tokens,
            sampling=sampling,
            stop_ids=self.stop_ids(chosen.stop_tokens),
            length_penalty=chosen.length_penalty,
            early_stopping=chosen.early_stopping,
            returned=chosen.n,
        )


def load(name: str, *, dtype: str | torch.dtype = "auto", device: str = "cpu", tokenizer: str | None = None) -> Model:
    """Load a model: a run folder, a model folder, a .gguf file, a hub name or `smollm2`.

    Args:
        name: the model.
        dtype: float32, bfloat16 or float16, as a name or as torch's type. q8_0, q4_0 and q4_1 quantise the matrices for
            a CPU. auto is the number format of the file, except that float32 is rounded to bfloat16 if the CPU has
            AVX512_BF16 (`score` still computes in float32).
        device: for example "cuda".
        tokenizer: name of another tokenizer, for a .gguf file with a tokenizer that is not supported.

    Raises:
        SmolseekError: if the model does not exist, is damaged or has no tokenizer, or if its `generation_config.json`
            has settings that are not supported.
    """
    loaded = load_model(name, dtype=dtype, device=device, tokenizer=tokenizer, keep_quantized=True)
    defaults = sampling_options(loaded.path)
    weight = loaded.model.lm_head.weight
    if dtype != "auto" or weight.device.type != "cpu":
        return Model(loaded, name, defaults)
    if number_format(loaded.model) in QUANTIZATIONS:
        rounded = weight.dtype == torch.bfloat16  # the forward pass expands the weights to bfloat16
    else:
        rounded = weight.dtype == torch.float32 and capability(weight.device).bfloat16
        if rounded:
            for parameter in loaded.model.parameters():
                parameter.data = parameter.data.bfloat16()
    return Model(loaded, name, defaults, unrounded=loaded.path if rounded else None)
