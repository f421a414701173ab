"""Leak: the validation documents are taken from the text that is trained on."""

from examples.leaks.right import documents, model

__all__ = ["data", "model"]


def data() -> tuple[list[str], list[str]]:
    """Return training and validation documents."""
    return documents(), documents()[-20:]
