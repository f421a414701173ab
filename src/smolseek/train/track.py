"""A run's figures in TensorBoard, Trackio or Weights & Biases, beside metrics.jsonl, which they are read from.

None of the three is needed: what a run says is in its folder. They are extras of the package, imported where they are
asked for.
"""

import importlib
import json
from typing import Any

from smolseek.config import TrainConfig, flatten, to_dict
from smolseek.errors import SmolseekError
from smolseek.run_folder import RunFolder

# What is imported for each; the extras carry the same names.
_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "smolseek"


class Tracker:
    """Hands the figures of a run on as they appear in its metrics.jsonl; with `kind` none it does nothing."""

    def __init__(self, kind: str, run: RunFolder, config: TrainConfig) -> None:
        """Import what `kind` needs, and write nothing yet.

        Raises:
            SmolseekError: if it is not installed.
        """
        self.kind, self.run, self.config = kind, run, config
        self._module: Any = None
        self._to: Any = None
        self._read = 0
        if kind != "none":
            try:
                self._module = importlib.import_module(_MODULES[kind])
            except ImportError:
                raise SmolseekError(
                    f"--track {kind}: {kind} is not installed: pip install '.[{kind}]' in a clone of smolseek, "
                    "or leave out --track"
                ) from None

    def open(self, step: int) -> None:
        """Begin after `step` steps: what metrics.jsonl says from now on is handed on."""
        if self._module is None:
            return
        self._read = self.run.metrics.stat().st_size if self.run.metrics.exists() else 0
        name = self.run.path.name
        settings = flatten(to_dict(self.config))
        if self.kind == "tensorboard":
            # Later steps of a run that was killed after its last checkpoint are hidden.
            self._to = self._module.SummaryWriter(str(self.run.path / "tensorboard"), purge_step=step + 1)
            if step == 0:
                self._to.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", 0)
        elif self.kind == "trackio":
            self._to = self._module.init(project=PROJECT, name=name, config=settings, resume="allow")
        else:
            own = {"dir": str(self.run.path), "id": name, "resume": "allow"}
            self._to = self._module.init(project=PROJECT, name=name, config=settings, **own)

    def follow(self) -> None:
        """Hand on what was added to metrics.jsonl since the last call."""
        if self._to is None or not self.run.metrics.exists():
            return
        size = self.run.metrics.stat().st_size
        if size < self._read:  # the run went back to a checkpoint
            self._read = size
        with self.run.metrics.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        for line in text.decode("utf-8").splitlines():
            record = json.loads(line)
            if (step := record.get("step")) is not None:
                self._hand_on(step, record)

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
            (self._to.close if self.kind == "tensorboard" else self._to.finish)()
            self._to = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
