"""A chat on the terminal."""

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from smolseek import console
from smolseek.api import Message, Model
from smolseek.config import ALIASES, GenerationOptions, SamplingOptions, from_dict, parse_json
from smolseek.device import capability
from smolseek.errors import SmolseekError
from smolseek.generate.scheduler import Scheduler

HELP = """\
/reset            start a new conversation
/system TEXT      set the system message and start anew; without TEXT remove it
/params A=B ...   change options, for example /params temperature=0.5 top_p=0.9;
                  without arguments show them
/save FILE        write the conversation as JSON
/exit             quit, as Ctrl-D does; Ctrl-C stops an answer"""

SETTABLE = (*(field.name for field in fields(SamplingOptions)), "max_tokens")


class Chat:
    """A conversation with a model, in the chat template of the model.

    Args:
        model: the model.
        options: fields of `GenerationOptions`.
        system: the system message.
    """

    def __init__(self, model: Model, options: dict[str, Any], system: str | None = None) -> None:
        self.model, self.options, self.system = model, options, system
        self.history: list[Message] = []
        # With CUDA graphs, a Generator decodes faster than a Scheduler, and reads the conversation anew in each turn.
        self._scheduler: Scheduler | None = None
        if not capability(model.model.lm_head.weight.device).cuda_graphs:
            context = model.config.max_position_embeddings
            self._scheduler = Scheduler(model.model, max_sequences=1, cache_tokens=context, fill_cache=False)

    @property
    def messages(self) -> list[Message]:
        """The conversation, with the system message if there is one."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.history

    def answer(self, question: str, show: Callable[[str], None]) -> str:
        """Answer `question`, and call `show` with each piece of text. Ctrl-C ends the answer and keeps its text.

        The scheduler keeps the tokens of the conversation, so only what is new is read.
        """
        message: Message = {"role": "user", "content": question}
        stream = self.model.chat([*self.messages, message], scheduler=self._scheduler, **self.options)
        answer = ""
        with _interrupt_calls(stream.cancel):
            try:
                for piece in stream:
                    answer += piece
                    show(piece)
            except KeyboardInterrupt:
                pass
            finally:
                stream.cancel()
                stream.finish()
        self.history += [message, {"role": "assistant", "content": answer}]
        return answer

    def command(self, line: str) -> str:
        """Run a line that begins with `/` and return the text to print.

        Raises:
            SmolseekError: for an unknown command or a wrong value.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/reset":
            self.history = []
            return "a new conversation"
        if name == "/system":
            self.system, self.history = value or None, []
            return "system message set, a new conversation" if value else "no system message, a new conversation"
        if name == "/params":
            self.options = self._changed(value)
            return ", ".join(f"{key} {option}" for key, option in self.options.items()) or "the defaults"
        if name == "/save":
            if not value:
                raise SmolseekError("/save needs a file name: for example /save talk.json")
            text = json.dumps(self.messages, indent=2, ensure_ascii=False)
            try:
                Path(value).expanduser().write_text(text + "\n", encoding="utf-8", errors="replace")
            except (RuntimeError, ValueError) as error:  # no such home directory, or an invalid name
                raise SmolseekError(f"/save {value!r}: {error}: give another file") from None
            return f"saved {len(self.messages)} messages to {value}"
        if name == "/help":
            return HELP
        raise SmolseekError(f"unknown command {name}: /help lists the commands")

    def _changed(self, arguments: str) -> dict[str, Any]:
        changed = dict(self.options)
        for argument in arguments.split():
            name, _, value = argument.partition("=")
            name = name.replace("-", "_")
            name = ALIASES.get(name, name)
            if name not in SETTABLE:
                raise SmolseekError(f"unknown parameter {name!r}: use one of {', '.join(SETTABLE)}")
            try:
                changed[name] = parse_json(value)
            except ValueError:
                raise SmolseekError(f"{name} {value!r} is not a number: for example /params temperature=0.5") from None
        from_dict(GenerationOptions, changed, "/params")
        return changed


@contextlib.contextmanager
def _interrupt_calls(cancel: Callable[[], None]) -> Iterator[None]:
    """Context in which Ctrl-C calls `cancel`. KeyboardInterrupt could be raised within a step of the scheduler."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield
        return
    handler = signal.signal(signal.SIGINT, lambda _number, _frame: cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def talk(chat: Chat) -> None:
    """Read questions from stdin until the end of the input, and answer them."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # adds line editing to input()

        console.say(f"{chat.model.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D quits")
    while True:
        try:
            line = input("> " if interactive else "").strip()
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
            if not interactive:
                raise
            console.say(f"error: {error}")
