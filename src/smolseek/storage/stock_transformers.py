"""Opens models with stock transformers, without remote code, without pickles, and without printing anything."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolseek.errors import SmolseekError, reason


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside this `with` block transformers prints neither progress bars nor warnings."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def open_with_transformers(path: Path, dtype: Any, name: str, advice: str) -> Any:
    """Return the causal language model in the folder `path`, in evaluation mode.

    Raises SmolseekError if transformers cannot open the folder. The error message calls the model `name`, and ends
    with `advice`.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
    except Exception as error:  # an unsuitable folder can raise any type of error
        raise SmolseekError(f"transformers cannot open {name} ({reason(error)}): {advice}") from error
