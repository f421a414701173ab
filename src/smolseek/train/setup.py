"""A training run set up: datasets opened, the model built, and all of it as it was at the checkpoint."""

import os
from dataclasses import dataclass, field
from functools import partial

import torch

from smolseek import console
from smolseek.config import TrainConfig
from smolseek.distributed.single_process import SingleProcess
from smolseek.run_folder import RunFolder
from smolseek.storage.saver import Saver
from smolseek.storage.target import resolve
from smolseek.train import resume
from smolseek.train.balance import Balancer
from smolseek.train.datasets import Datasets, open_datasets
from smolseek.train.device import autocast
from smolseek.train.distill import Teacher, attention_only
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.guard import Guard
from smolseek.train.logging import Clock
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer
from smolseek.train.schedule import Schedule
from smolseek.train.state import TrainState
from smolseek.train.track import Tracker


@dataclass(kw_only=True)
class Training(TrainState):
    """A run between two steps, with all that its steps use."""

    config: TrainConfig
    run: RunFolder
    device: torch.device
    datasets: Datasets | None
    """On the main process, the one that reads."""
    val_rows: torch.Tensor
    """Sequences of validation text, int64 [N, T+1], on every process."""
    val_bytes: int
    """UTF-8 bytes that their targets stand for."""
    forward_backward: ForwardBackward
    schedule: Schedule
    input_digests: dict[str, str]
    """Of the tokenizer, the validation text and the teacher, for checkpoints."""
    saver: Saver
    saved_step: int = 0
    """Step of the last checkpoint that was begun."""
    tracker: Tracker
    log: console.Log
    clock: Clock = field(default_factory=Clock)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.config.steps


def set_up(run: RunFolder, start: resume.Start, device: torch.device, distributed: SingleProcess) -> Training:
    """Return the run as it starts, with nothing written yet.

    Raises:
        SmolseekError: for data, a model, a teacher or a checkpoint that cannot be opened or do not fit.
    """
    config, datasets = start.config, None
    tracker = Tracker(config.track if distributed.is_main else "none", run, config)
    if distributed.is_main:
        datasets = open_datasets(config, start.tokenizer_copy, resumed=start.checkpoint is not None)
    stream = distributed.share_stream(datasets.stream if datasets else None)
    val_rows = distributed.broadcast_tensor(datasets.val_rows if datasets else None)
    val_bytes = distributed.broadcast_object(lambda: datasets.val_bytes if datasets else 0)

    model = distributed.build_model(config.model, config.seed, device)
    model.grad_checkpointing = config.grad_checkpointing
    teacher = None
    if config.distill.teacher is not None:
        teacher = Teacher(config.distill.teacher, config.model.vocab_size, device)
    if config.distill.attention_only:
        attention_only(model)
    objective = partial(losses, z_loss=config.optim.z_loss) if teacher is None else teacher.losses
    context, accum, alpha = autocast(config.precision, device), config.grad_accum, config.balance.alpha
    training = Training(
        model=model,
        optimizer=make_optimizer(model, config.optim, distributed.optimizer_parameters(model)),
        balancer=Balancer(model, config.balance.gamma),
        stream=stream,
        guard=Guard(config.guard),
        distributed=distributed,
        config=config,
        run=run,
        device=device,
        datasets=datasets,
        val_rows=val_rows,
        val_bytes=val_bytes,
        forward_backward=ForwardBackward(model, objective, distributed, context, grad_accum=accum, alpha=alpha),
        schedule=Schedule.of(config),
        input_digests=(datasets.fingerprints() if datasets else {})
        | ({"teacher": teacher.fingerprint()} if teacher else {}),
        saver=Saver(
            run,
            model,
            datasets.tokenizer if datasets else None,
            distributed,
            timeout=config.mesh.timeout,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
        ),
        tracker=tracker,
        log=console.Log(run.log if distributed.is_main else os.devnull),
    )
    _load(training, start)
    return training


def _load(t: Training, start: resume.Start) -> None:
    """Load the checkpoint that the run goes on from, or the weights that it begins with."""
    if start.checkpoint is not None:
        t.restore(start.checkpoint, data=True)
        if start.previous is not None:
            resume.check_inputs(t.input_digests, start)
    elif start.config.init is not None:
        t.load_weights(resolve(start.config.init))
    if start.checkpoint is None and start.config.distill.teacher is not None:
        t.progress.evaluated = -1  # the divergence before the first step
    t.saved_step = t.progress.step
