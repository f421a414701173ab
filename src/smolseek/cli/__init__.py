"""The command line: one verb a function, heavy imports inside, one line for an error."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from smolseek import __version__, console, launch
from smolseek.cli.auditing import audit
from smolseek.cli.models import compare, convert, evaluate, inspect
from smolseek.cli.preparing import prepare
from smolseek.cli.reporting import report
from smolseek.cli.training import heal, train
from smolseek.cli.writing import chat, generate
from smolseek.errors import PeerLost, SmolseekError, Stopped, nearest

VERBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "inspect": (inspect, "what a preset or a model amounts to: parameters, cache, arithmetic, memory"),
    "train": (train, "train a model from a preset, or go on with a run"),
    "prepare": (prepare, "make text into tokens once, for training at memory speed"),
    "generate": (generate, "continue a prompt"),
    "chat": (chat, "talk with a model that has a chat template"),
    "convert": (convert, "make a DeepSeek model of a Llama's weights, with nothing lost"),
    "heal": (heal, "bring a compressed model nearer to its source, by distillation"),
    "compare": (compare, "how far two models are apart: losses, divergence, cache, parameters"),
    "eval": (evaluate, "a model's score on the tasks of lm-eval: hellaswag, piqa, arc_easy, ..."),
    "report": (report, "a page about a run, or one that compares runs"),
    "audit": (audit, "whether a model's numbers can be believed: leaks, labels, data, experts, decoding"),
}

_VERB_LINES = "\n".join(f"  {verb:9} {what}" for verb, (_, what) in VERBS.items())
OVERVIEW = f"""\
usage: smolseek VERB ...

Small DeepSeek-style language models.

{_VERB_LINES}

  smolseek inspect tiny
  smolseek train tiny --data builtin --run runs/tiny
  smolseek generate runs/tiny "The structure of DNA"

smolseek VERB --help tells a verb's options, --version the version; --debug shows the traceback of an error."""

JOBS = frozenset({"train", "prepare", "convert", "heal", "report", "audit"})
"""Verbs whose result is in files or in the exit status: they go on when nobody reads what they print."""


def run_verb(argv: Sequence[str]) -> None:
    """Carry out a command line."""
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        console.say(OVERVIEW)
    elif verb == "--version":
        console.say(f"smolseek {__version__}")
    elif verb in VERBS:
        with console.unattended() if verb in JOBS else contextlib.nullcontext():
            VERBS[verb][0](argv[1:])
    else:
        hint = nearest(verb, VERBS) or f": choose one of {', '.join(VERBS)}"
        raise SmolseekError(f"unknown {'option' if verb.startswith('-') else 'verb'} {verb!r}{hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit status.

    0 done; 1 a failure of ours; 2 a mistake of the user's, or a disk, a file or another process that fails; 75 the
    training data is away for now; 130 interrupted (SIGINT); 141 nobody reads the output any more; 128 + N ended by
    signal N (143 for SIGTERM). A training run that exits with 75 or more and says so has saved, and goes on with
    --resume.
    """
    console.open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # a caller has read of it already
            sys.stdin.reconfigure(errors="surrogateescape")  # told of where the text is used
    try:
        run_verb([word for word in words if word != "--debug"])
        return 0
    except SystemExit as stop:  # tyro's --help
        return int(stop.code or 0)
    except Stopped as stop:
        console.complain(str(stop))
        return stop.code
    except KeyboardInterrupt:
        console.complain("interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        common = isinstance(error, SmolseekError) and not isinstance(error, PeerLost)
        if common and words[:1] == ["train"] and not launch.speaks():
            return 2
        what = _told(error)
        ours = what is None
        line = f"{type(error).__name__}: {error} (--debug shows why)" if what is None else what
        console.complain(f"error: {console.printable(line)}")
        return 1 if ours else 2
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would flush it once more at its end, and exit with a status of its own
            console.discard_output()


def _told(error: Exception) -> str | None:
    """Return an error of the user's, of a disk, or of a memory that is too small, in words; None for one of ours."""
    if isinstance(error, SmolseekError):
        return str(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "the memory does not suffice: take a smaller model, batch or text, or close other programs"
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        return f"{error.object!r} is no text of UTF-8: correct that name or text"
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return "a name has a NUL character in it, which no file system takes: correct it"
    if isinstance(error, OSError):
        if error.filename is None or error.strerror is None:
            return str(error) or type(error).__name__
        return f"{os.fsdecode(error.filename)}: {error.strerror}: check that path, or give another"
    return None
