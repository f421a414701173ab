"""Sends a run's metrics to TensorBoard, Trackio or Weights & Biases, in addition to metrics.jsonl.

These trackers are optional dependencies (extras), imported only if `--track` asks for one. A tracker that fails during
the run, for example because its server is unavailable, does not end the run.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator
from typing import Any, Self

from smolseek import console
from smolseek.errors import SmolseekError, reason
from smolseek.run_folder import RunFolder

# The Python module of each tracker; each extra is named after its tracker.
_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "smolseek"


class Tracker:
    """Forwards the records of a run's metrics.jsonl to the tracker `kind`; for `none`, it does nothing."""

    def __init__(self, kind: str, run: RunFolder, settings: dict[str, Any]) -> None:
        """Import the tracker, without writing anything; `settings` are the run's settings with dotted keys.

        Raises:
            SmolseekError: if the tracker is not installed.
        """
        self.kind, self.run, self.settings = kind, run, settings
        self._sink: Any = None
        if kind != "none":
            try:
                self._module = importlib.import_module(_MODULES[kind])
            except ImportError:
                raise SmolseekError(
                    f"--track {kind}: {kind} is not installed: pip install {kind}, or leave out --track"
                ) from None

    def open(self, step: int) -> None:
        """Start to forward records, at a point where the run has done `step` steps."""
        if self.kind == "none":
            return
        self.run.unread, name, folder = [], self.run.path.name, str(self.run.path)
        with self._contained():
            if self.kind == "tensorboard":
                # A killed run may have written steps after its last checkpoint: hide these.
                self._sink = self._module.SummaryWriter(f"{folder}/tensorboard", purge_step=step + 1)
                if step == 0:
                    self._sink.add_text("settings", f"```\n{json.dumps(self.settings, indent=1)}\n```", 0)
            else:
                more = {"id": name, "dir": folder} if self.kind == "wandb" else {}
                self._sink = self._module.init(project=PROJECT, name=name, config=self.settings, resume="allow", **more)

    def follow(self) -> None:
        """Forward the records that the run has written since the last call."""
        records, self.run.unread = self.run.unread or [], None if self._sink is None else []
        with self._contained():
            for record in records if self._sink is not None else ():
                step = record["step"]
                figures = {key: n for key, n in record.items() if type(n) in (int, float) and key != "step"}
                if self.kind == "tensorboard":
                    for key, value in figures.items():
                        self._sink.add_scalar(key, value, step)
                    if "samples" in record:
                        texts = "\n\n".join(f"**{prompt}** {text}" for prompt, text in record["samples"])
                        self._sink.add_text("samples", texts, step)
                    self._sink.flush()
                elif figures:
                    self._sink.log(figures, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.follow()
        if self._sink is not None:
            with self._contained():
                (self._sink.close if self.kind == "tensorboard" else self._sink.finish)()

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """Context in which an error of the tracker ends the tracking with a warning, but not the run."""
        try:
            yield
        except Exception as error:
            self._sink = None
            console.warn(f"--track {self.kind} failed and is disabled, but the run continues: {reason(error)}")
