"""A run's figures in TensorBoard, Trackio or Weights & Biases, beside metrics.jsonl.

None of the three is needed: what a run says is in its folder. They are extras of the package, imported where they are
asked for. One that fails later (its server is away, its disk is full) ends no run.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator
from typing import Any

from smolseek import console
from smolseek.config import TrainConfig, flatten, to_dict
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder

# What is imported for each; the extras carry the same names.
_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "smolseek"


class Tracker:
    """Hands on the records of a run that it appends to metrics.jsonl; with `kind` none it does nothing."""

    def __init__(self, kind: str, run: RunFolder, config: TrainConfig) -> None:
        """Import what `kind` needs, and write nothing yet.

        Raises:
            SmolseekError: if it is not installed.
        """
        self.kind, self.run, self.config = kind, run, config
        self._writer: Any = None
        if kind != "none":
            try:
                self._module = importlib.import_module(_MODULES[kind])
            except ImportError:
                raise SmolseekError(
                    f"--track {kind}: {kind} is not installed: pip install '.[{kind}]' in a clone of smolseek, "
                    "or leave out --track"
                ) from None

    def open(self, step: int) -> None:
        """Begin after `step` steps: what the run records from now on is handed on."""
        if self.kind == "none":
            return
        self.run.unread = []
        settings, name = flatten(to_dict(self.config)), self.run.path.name
        with self._survived():
            if self.kind == "tensorboard":
                # Later steps of a run that was killed after its last checkpoint are hidden.
                folder = str(self.run.path / "tensorboard")
                self._writer = self._module.SummaryWriter(folder, purge_step=step + 1)
                if step == 0:
                    self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", 0)
            elif self.kind == "trackio":
                self._writer = self._module.init(project=PROJECT, name=name, config=settings, resume="allow")
            else:
                folder = str(self.run.path)
                self._writer = self._module.init(
                    project=PROJECT, name=name, id=name, config=settings, dir=folder, resume="allow"
                )

    def follow(self) -> None:
        """Hand on what the run has recorded since the last call."""
        records, self.run.unread = self.run.unread or [], None if self._writer is None else []
        with self._survived():
            for record in records:
                if self._writer is not None and "step" in record:
                    self._hand_on(record)

    def close(self) -> None:
        """Hand on the rest and end."""
        self.follow()
        if self._writer is not None:
            with self._survived():
                (self._writer.close if self.kind == "tensorboard" else self._writer.finish)()
            self._writer = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        """Within it, whatever the tracker raises ends the tracking, in one line, and not the run."""
        try:
            yield
        except Exception as error:
            self._writer = None
            what = " ".join(str(error).split())[:200]
            console.warn(f"--track {self.kind} ends here, and the run goes on: {type(error).__name__}: {what}")

    def _hand_on(self, record: dict[str, Any]) -> None:
        step = record["step"]
        figures = {key: value for key, value in record.items() if type(value) in (int, float) and key != "step"}
        if self.kind == "tensorboard":
            for key, value in figures.items():
                self._writer.add_scalar(key, value, step)
            if "samples" in record:
                self._writer.add_text("samples", "\n\n".join(f"**{a}** {b}" for a, b in record["samples"]), step)
            self._writer.flush()
        elif figures:
            self._writer.log(figures, step=step)
