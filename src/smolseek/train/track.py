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
        self._module: Any = None
        self._to: Any = None
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
        if self._module is None:
            return
        self.run.unread = []
        with self._survived():
            self._to = self._begun(step)

    def follow(self) -> None:
        """Hand on what the run has recorded since the last call."""
        records, self.run.unread = self.run.unread or [], None if self._to is None else []
        with self._survived():
            for record in records:
                if self._to is not None and (step := record.get("step")) is not None:
                    self._hand_on(step, record)

    @contextlib.contextmanager
    def _survived(self) -> Iterator[None]:
        """Within it, whatever the tracker raises ends the tracking, in one line, and not the run."""
        try:
            yield
        except Exception as error:
            self._to = None
            what = " ".join(str(error).split())[:200]
            console.warn(f"--track {self.kind} ends here, and the run goes on: {type(error).__name__}: {what}")

    def _begun(self, step: int) -> Any:
        name = self.run.path.name
        settings = flatten(to_dict(self.config))
        if self.kind == "tensorboard":
            # Later steps of a run that was killed after its last checkpoint are hidden.
            to = self._module.SummaryWriter(str(self.run.path / "tensorboard"), purge_step=step + 1)
            if step == 0:
                to.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", 0)
            return to
        if self.kind == "trackio":
            return self._module.init(project=PROJECT, name=name, config=settings, resume="allow")
        own = {"dir": str(self.run.path), "id": name, "resume": "allow"}
        return self._module.init(project=PROJECT, name=name, config=settings, **own)

    def _hand_on(self, step: int, record: dict[str, Any]) -> None:
        figures = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step"
        }
        if self.kind == "tensorboard":
            for key, value in figures.items():
                self._to.add_scalar(key, value, step)
            if "samples" in record:
                self._to.add_text("samples", "\n\n".join(f"**{a}** {b}" for a, b in record["samples"]), step)
            self._to.flush()
        elif figures:
            self._to.log(figures, step=step)

    def close(self) -> None:
        """Hand on the rest and end."""
        self.follow()
        if self._to is not None:
            with self._survived():
                (self._to.close if self.kind == "tensorboard" else self._to.finish)()
            self._to = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
