"""A conversation on the terminal."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from smolseek import console
from smolseek.api import Message, Model
from smolseek.config import from_dict, parse_json
from smolseek.errors import SmolseekError
from smolseek.sampling_options import SamplingOptions

HELP = """\
/reset            forget the conversation
/system TEXT      set the system message and begin anew; without TEXT remove it
/params A=B ...   change sampling options, for example /params temperature=0.5 top_p=0.9; alone it shows them
/save FILE        write the conversation as JSON
/exit             leave (as Ctrl-D); Ctrl-C stops an answer"""

SETTABLE = tuple(field.name for field in fields(SamplingOptions))


class Chat:
    """A conversation with a model in its own chat template.

    Args:
        model: the model.
        options: fields of `SamplingParams`.
        max_tokens: tokens of an answer, at most.
        system: the system message.
    """

    def __init__(self, model: Model, options: dict[str, Any], max_tokens: int, system: str | None = None) -> None:
        model.sampling(**options)  # refuses wrong numbers before the first question
        self.model, self.options, self.max_tokens, self.system = model, options, max_tokens, system
        self.history: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation, with the system message where there is one."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.history

    def answer(self, question: str, show: Callable[[str], None]) -> str:
        """Answer `question`, calling `show` with each piece; an interrupt ends the answer, and what was said stays."""
        asked: Message = {"role": "user", "content": question}
        stream = self.model.chat([*self.messages, asked], max_tokens=self.max_tokens, **self.options)
        said = ""
        try:
            for piece in stream:
                said += piece
                show(piece)
        except KeyboardInterrupt:
            pass
        self.history += [asked, {"role": "assistant", "content": said}]
        return said

    def command(self, line: str) -> str:
        """Carry out a line that begins with `/` and return what to say.

        Raises:
            SmolseekError: for an unknown command or a wrong value.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.history = []
            return "a new conversation"
        if name == "/system":
            self.system, self.history = rest or None, []
            return "system message set, a new conversation" if rest else "no system message, a new conversation"
        if name == "/params":
            self.options = self._changed(rest)
            return ", ".join(f"{key} {value}" for key, value in self.options.items()) or "the usual strategy"
        if name == "/save":
            if not rest:
                raise SmolseekError("/save needs a file: /save talk.json")
            text = json.dumps(self.messages, indent=2, ensure_ascii=False)
            try:
                Path(rest).expanduser().write_text(text + "\n", encoding="utf-8", errors="replace")
            except (RuntimeError, ValueError) as error:  # no such home, or a name that no file system takes
                raise SmolseekError(f"/save {rest!r}: {error}: give another file") from None
            return f"saved {len(self.messages)} messages to {rest}"
        if name == "/help":
            return HELP
        raise SmolseekError(f"unknown command {name}: /help lists them")

    def _changed(self, words: str) -> dict[str, Any]:
        changed = dict(self.options)
        try:
            parted = shlex.split(words)
        except ValueError as error:
            raise SmolseekError(f"/params {words}: {error}: for example /params temperature=0.5") from None
        for word in parted:
            key, _, value = word.partition("=")
            key = key.replace("-", "_")
            if key not in SETTABLE:
                raise SmolseekError(f"unknown parameter {key!r}: {', '.join(SETTABLE)}")
            try:
                changed[key] = parse_json(value)
            except ValueError:
                raise SmolseekError(f"{key} {value!r} is not a number: for example /params temperature=0.5") from None
        from_dict(SamplingOptions, {key: value for key, value in changed.items() if key in SETTABLE}, "/params")
        return changed


def talk(chat: Chat) -> None:
    """Read questions from stdin and answer them until its end."""
    shown = sys.stdin.isatty()
    if shown:
        import readline  # noqa: F401  # lines can be edited

        console.say(f"{chat.model.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = input("> " if shown else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.say()
            continue
        if line == "/exit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                console.say(chat.command(line))
            else:
                chat.answer(line, console.stream)
                console.say()
        except (SmolseekError, OSError) as error:
            if not shown:
                raise
            console.say(f"error: {error}")
