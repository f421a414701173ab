"""Small DeepSeek-style language models: train, convert, compare and run them."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `load` at its first use, so that importing the package stays quick."""
    if name == "load":
        from smolseek.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
