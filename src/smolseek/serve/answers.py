"""Answers in OpenAI's form: chat and completion objects, the chunks of streams, usage and finish reasons."""

import secrets
import time
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal

from smolseek.generate.engine import StopReason
from smolseek.generate.request import Finished, NewToken, Top
from smolseek.serve.jobs import Job
from smolseek.serve.vocabulary import Vocabulary
from smolseek.serve.worker import Delta

LOWEST_LOGPROB = -9999.0
"""Stands for a log-probability of minus infinity, which JSON cannot write; OpenAI uses the same number."""


def finish_reason(reason: StopReason) -> Literal["stop", "length"]:
    """Return OpenAI's finish reason: "stop" for a stop token or string, "length" for every limit."""
    return "stop" if reason in ("stop_token", "stop_string") else "length"


class Answer:
    """The answer to one request, in pieces or in one object.

    Args:
        job: what was requested.
        model: the model's name in /v1/models.
        vocabulary: the texts of tokens.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, job: Job, model: str, vocabulary: Vocabulary) -> None:
        self.job, self._vocabulary = job, vocabulary
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.finished: dict[int, Finished] = {}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks that are sent before the first token."""
        return [
            self._chunk([self._choice(n, {"delta": {"role": "assistant", "content": ""}}, (), None)])
            for n in range(len(self.job.texts))
        ]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks for what is new in a text. The last chunk of a text has the finish reason and no text."""
        chunks = []
        if delta.text or delta.tokens:
            content = {"delta": {"content": delta.text}}
            chunks.append(self._chunk([self._choice(delta.text_number, content, delta.tokens, None)]))
        if delta.end is not None:
            self.finished[delta.text_number] = delta.end
            chunks.append(self._chunk([self._choice(delta.text_number, {"delta": {}}, (), delta.end)]))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream, with the number of tokens."""
        return self._chunk([]) | {"usage": self.usage()}

    def complete(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """Return the complete answer."""
        texts = [""] * len(self.job.texts)
        tokens: list[list[NewToken]] = [[] for _ in texts]
        for delta in deltas:
            texts[delta.text_number] += delta.text
            tokens[delta.text_number] += delta.tokens
            if delta.end is not None:
                self.finished[delta.text_number] = delta.end
        choices = [self._complete_choice(n, texts[n], tokens[n]) for n in range(len(texts))]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the number of tokens. A prompt counts once, with the cache that its first text found."""
        first = [self.finished[n] for n in range(0, len(self.job.texts), self.job.n) if n in self.finished]
        prompt = sum(end.prompt_tokens for end in first)
        new = 0 if self.job.scored_only else sum(end.completion_tokens for end in self.finished.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in first)},
        }

    def _chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.job.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": list(choices), **usage}

    def _complete_choice(self, number: int, text: str, tokens: Sequence[NewToken]) -> dict[str, Any]:
        message = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return self._choice(number, message, tokens, self.finished[number])

    def _choice(
        self, number: int, content: dict[str, Any], tokens: Sequence[NewToken], end: Finished | None
    ) -> dict[str, Any]:
        reason = None if end is None else "length" if self.job.scored_only else finish_reason(end.reason)
        choice = {"index": number, **content, "logprobs": self._logprobs(number, tokens, end), "finish_reason": reason}
        if self.job.experts:
            choice["smolseek"] = self._experts(number, tokens, end)
        return choice

    def _logprobs(self, number: int, tokens: Sequence[NewToken], end: Finished | None) -> dict[str, Any] | None:
        if self.job.logprobs is None or not tokens:
            return None
        content = [
            self._scored(token.id, token.logprob) | {"top_logprobs": [self._scored(i, value) for i, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        utf8 = list(self._vocabulary.utf8(token))
        return {"token": self._vocabulary.text(token), "logprob": max(logprob, LOWEST_LOGPROB), "bytes": utf8}

    def _experts(self, number: int, tokens: Sequence[NewToken], end: Finished | None) -> dict[str, Any]:
        """Return the experts of each token; of the prompt, those tokens that were read."""
        of_tokens = [(token.id, token.experts) for token in tokens]
        prompt = self.job.texts[number].request.prompt
        read = next((event.prompt_experts for event in (*tokens, end) if event and event.prompt_experts), None)
        of_prompt = [] if not read else list(zip(prompt[-len(read) :], read, strict=True))
        report = {"tokens": of_tokens} | ({} if read is None else {"prompt": of_prompt})
        return {
            name: [{"id": i, "text": self._vocabulary.text(i), "experts": experts} for i, experts in listed]
            for name, listed in report.items()
        }


class CompletionAnswer(Answer):
    """The answer to a request to /v1/completions, whose log-probabilities have an older form."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, job: Job, model: str, vocabulary: Vocabulary) -> None:
        super().__init__(job, model, vocabulary)
        self._offsets = [0] * len(job.texts)
        """Number of characters of the tokens that were reported, for each text."""
        self._echoed: set[int] = set()

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return no chunks: a completion begins with its text."""
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks for what is new in a text, the first one with the prompt if it is returned, too."""
        text, chunks = self._with_prompt(delta.text_number, delta.text), []
        if text or delta.tokens:
            chunks.append(self._chunk([self._choice(delta.text_number, {"text": text}, delta.tokens, None)]))
        if delta.end is not None:
            self.finished[delta.text_number] = delta.end
            chunks.append(self._chunk([self._choice(delta.text_number, {"text": ""}, (), delta.end)]))
        return chunks

    def _complete_choice(self, number: int, text: str, tokens: Sequence[NewToken]) -> dict[str, Any]:
        return self._choice(number, {"text": self._with_prompt(number, text)}, tokens, self.finished[number])

    def _with_prompt(self, number: int, text: str) -> str:
        """Return new text, after the prompt if this is the beginning of an echo."""
        text = "" if self.job.scored_only else text
        if self.job.echo is None or number in self._echoed:
            return text
        self._echoed.add(number)
        return self.job.echo[number // self.job.n] + text

    def _logprobs(self, number: int, tokens: Sequence[NewToken], end: Finished | None) -> dict[str, Any] | None:
        if self.job.logprobs is None:
            return None
        scored: list[tuple[int, float | None, Top | None]] = []
        of_prompt = next(
            (one.prompt_logprobs for one in (*tokens, end) if one and one.prompt_logprobs is not None), None
        )
        if of_prompt is not None:
            prompt = self.job.texts[number].request.prompt
            scored.append((prompt[0], None, None))
            scored += [(i, *values) for i, values in zip(prompt[1:], of_prompt, strict=True)]
        if not self.job.scored_only:
            scored += [(token.id, token.logprob, token.top) for token in tokens]
        if not scored:
            return None
        utf8 = [self._vocabulary.utf8(i) for i, _, _ in scored]
        characters = [sum(byte & 0xC0 != 0x80 for byte in of_token) for of_token in utf8]
        *offsets, self._offsets[number] = accumulate(characters, initial=self._offsets[number])
        return {
            "tokens": [self._vocabulary.text(i) for i, _, _ in scored],
            "token_logprobs": [None if value is None else max(value, LOWEST_LOGPROB) for _, value, _ in scored],
            "top_logprobs": [self._likeliest(*values) for values in scored],
            "text_offset": offsets,
        }

    def _likeliest(self, token: int, logprob: float | None, top: Top | None) -> dict[str, float] | None:
        """Return the likeliest tokens and the token itself, as OpenAI does."""
        if logprob is None or top is None:
            return None
        values = dict(top) | {token: logprob}
        return {self._vocabulary.text(i): max(value, LOWEST_LOGPROB) for i, value in values.items()}
