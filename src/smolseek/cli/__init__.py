"""The command line: one function per command, and one line per error.

Only the module of the given command is imported. Modules that need torch are imported after the arguments are parsed.
"""

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from smolseek import __version__, console, launch
from smolseek.errors import PeerLost, SmolseekError, Stopped, nearest

VERBS = {
    "train": ("training.train", "train a model from a preset, or resume a run"),
    "generate": ("writing.generate", "continue a prompt"),
    "chat": ("writing.chat", "chat with a model that has a chat template"),
    "serve": ("serving.serve", "serve a model over HTTP, with OpenAI's interface"),
    "convert": ("models.convert", "turn a Llama (SmolLM2) into MLA and experts, exactly or smaller"),
    "export": ("exporting.export", "write a model for other engines: GGUF for llama.cpp"),
    "heal": ("training.heal", "recover a compressed model's quality by distillation"),
    "audit": ("auditing.audit", "check a model and its run for leaks, wrong labels and more"),
    "compare": ("models.compare", "compare two models: loss, KL divergence, cache, parameters"),
    "eval": ("models.evaluate", "score a model on tasks of lm-eval: hellaswag, piqa, ..."),
    "inspect": ("models.inspect", "a model's size: parameters, cache, FLOPs, training memory"),
    "prepare": ("preparing.prepare", "tokenize text once, to train from memory-mapped files"),
    "report": ("reporting.report", "write an HTML page about a run, or comparing several"),
    "demo": ("demonstrating.demo", "convert SmolLM2, train a small model, write with both: the tour"),
    "doctor": ("checking.doctor", "say what works on this machine, and what to do about the rest"),
}
"""The function of each command, which is imported when the command runs, and the command's line in the overview."""

_VERB_LINES = "\n".join(f"  {verb:9} {what}" for verb, (_, what) in VERBS.items())
OVERVIEW = f"""\
usage: smolseek COMMAND ...

Train, convert, check and run small language models of the DeepSeek architecture
(multi-head latent attention and mixture of experts).

{_VERB_LINES}

  smolseek train tiny --data builtin --run runs/tiny
  smolseek generate runs/tiny "The structure of DNA"
  smolseek convert smollm2 smollm2-mla

smolseek COMMAND --help lists a command's options. --version prints the version,
--debug the traceback of an error."""

JOBS = frozenset({"train", "prepare", "convert", "export", "heal", "report", "audit", "serve", "demo"})
"""Commands that continue if nobody reads their output: the result is in files, in the exit code or on a socket."""


def run_verb(argv: Sequence[str]) -> None:
    """Run a command line."""
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        console.say(OVERVIEW)
    elif verb == "--version":
        console.say(f"smolseek {__version__}")
    elif verb in VERBS:
        module, _, function = VERBS[verb][0].partition(".")
        with console.unattended() if verb in JOBS else contextlib.nullcontext():
            getattr(importlib.import_module(f"smolseek.cli.{module}"), function)(argv[1:])
    else:
        hint = nearest(verb, VERBS) or f": choose one of {', '.join(VERBS)}"
        raise SmolseekError(f"unknown {'option' if verb.startswith('-') else 'command'} {verb!r}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code.

    The exit code is 0 after success, 1 after a bug of ours or a failed audit, and 2 after a user's mistake or a failure
    of a disk, a file or another process. It is 75 if the training data are unavailable for now, 141 if the reader of
    stdout has closed it, and 128 + N if signal N ended the command (130 for SIGINT, 143 for SIGTERM). If a training run
    exits with 75 or more and prints that it has saved, resume it with --resume.
    """
    console.open_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # if a caller has already read from stdin
            sys.stdin.reconfigure(errors="surrogateescape")  # the error is reported where the text is used
    try:
        run_verb([argument for argument in arguments if argument != "--debug"])
        return 0
    except SystemExit as stop:  # tyro's --help
        return int(stop.code or 0)
    except Stopped as stop:
        console.to_stderr(str(stop))
        return stop.code
    except KeyboardInterrupt:
        console.to_stderr("interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        same_everywhere = isinstance(error, SmolseekError) and not isinstance(error, PeerLost)
        if same_everywhere and arguments[:1] == ["train"] and not launch.speaks():
            return 2
        message = _user_message(error)
        line = f"{type(error).__name__}: {error} (--debug shows the traceback)" if message is None else message
        console.to_stderr(f"error: {console.printable(line)}")
        return 1 if message is None else 2
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # otherwise Python's flush at exit would fail and change the exit code
            console.discard_output()


def _user_message(error: Exception) -> str | None:
    """Return the message for a user's mistake, a disk error or a lack of memory; None for a bug of ours."""
    if isinstance(error, SmolseekError):
        return str(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory: use a smaller model, batch or text, or close other programs"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"{error.object!r} is not UTF-8 text: correct this name or text"
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return "a name contains a NUL character, which no file system allows: correct it"
    if isinstance(error, OSError):
        if error.filename is None or error.strerror is None:
            return str(error) or type(error).__name__
        return f"{os.fsdecode(error.filename)}: {error.strerror}: check this path, or give another path"
    return None
