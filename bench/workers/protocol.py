"""How bench/engines.py talks to an engine: a request is one line of JSON on stdin, its answer one line on stdout.

The workers are run by the Python of the engine's own environment and import nothing of smolseek.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import TextIO


def open_answers() -> TextIO:
    """Return a stream for the answers; whatever the engine prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, about: dict, **functions: Callable[..., dict]) -> None:
    """Answer with `about` first, then each request {"do": name, argument: value} with the result of its function."""
    print(json.dumps(about | {"functions": list(functions)}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(functions[request.pop("do")](**request)), file=answers, flush=True)
