"""Small DeepSeek-style language models: train, convert, compare and run them."""

import os
import sys

__version__ = "0.1.0"

if sys.platform == "darwin":
    # PyTorch reads this when it is loaded: operations that an Apple GPU lacks run on the CPU, and PyTorch says so once.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def __getattr__(name: str) -> object:
    """Import `load` at its first use, so that importing the package stays quick."""
    if name == "load":
        from smolseek.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
