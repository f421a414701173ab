"""Sets up a training run: opens the datasets, builds the model, and restores the state of the checkpoint."""

import hashlib
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smolseek import console
from smolseek.config import TrainConfig, flatten, to_dict
from smolseek.data.datasets import Corpus, open_dataset, open_stream
from smolseek.data.sequences import build_sequences
from smolseek.data.spelling import Spelling, sample
from smolseek.data.stream import TrainStream
from smolseek.device import capability
from smolseek.distributed.single_process import SingleProcess
from smolseek.errors import SmolseekError
from smolseek.model.transformer import zero_outputs
from smolseek.run_folder import RunFolder
from smolseek.storage.saver import Saver
from smolseek.storage.target import resolve
from smolseek.tokenizer import Encode, encoder, for_training, load_tokenizer, token_bytes
from smolseek.train.balance import Balancer
from smolseek.train.device import autocast
from smolseek.train.distill import attention_only, digest, open_teacher
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.guard import Guard
from smolseek.train.logging import Clock
from smolseek.train.loss import losses
from smolseek.train.loss_scale import LossScale
from smolseek.train.optim import make_optimizer
from smolseek.train.resume import Start, check_inputs
from smolseek.train.schedule import Schedule
from smolseek.train.state import TrainState
from smolseek.train.track import Tracker


@dataclass(frozen=True)
class Datasets:
    """The documents of a run and their tokens, on the main process."""

    tokenizer: Any
    encode: Encode
    corpus: Corpus
    stream: TrainStream
    val_sequences: torch.Tensor
    """Validation text, int64 [N, T+1]."""
    val_bytes: int
    """UTF-8 bytes that the target tokens of `val_sequences` encode."""

    def digests(self) -> dict[str, str]:
        """Return two digests for checkpoints: of the tokens of some training text, and of the validation sequences.

        The training text itself is identified by the fingerprint in the data stream's state.
        """
        beginnings = [text[:2000] for text in self.corpus.train[:8]]
        contents = {
            "tokens": repr(self.encode(beginnings)).encode(),
            "validation": self.val_sequences.numpy().tobytes(),
        }
        return {name: hashlib.blake2b(content, digest_size=16).hexdigest() for name, content in contents.items()}


@dataclass(kw_only=True)
class Training(TrainState):
    """The state of a run between two steps, with all objects that its steps use."""

    config: TrainConfig
    run: RunFolder
    device: torch.device
    datasets: Datasets | None
    """Datasets of the main process; None on all other processes."""
    val_sequences: torch.Tensor
    """Validation text, int64 [N, T+1], on every process."""
    val_bytes: int
    forward_backward: ForwardBackward
    schedule: Schedule
    input_digests: dict[str, str]
    """Digests of the tokenizer, the validation text and the teacher, for checkpoints."""
    saver: Saver
    saved_step: int = 0
    """Step of the newest checkpoint, whose saving may still be in progress."""
    tracker: Tracker
    log: console.Log
    clock: Clock = field(default_factory=Clock)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.config.steps


def set_up(run: RunFolder, start: Start, device: torch.device, distributed: SingleProcess) -> Training:
    """Return the run, ready for its next step, without writing anything.

    Raises:
        SmolseekError: for data, a model, a teacher or a checkpoint that cannot be opened, or that does not fit the
            configuration.
    """
    config = start.config
    tracker = Tracker(config.track if distributed.is_main else "none", run, flatten(to_dict(config)))
    datasets, digests, tokenizer = None, {}, None
    if distributed.is_main:
        datasets = open_datasets(config, start.tokenizer_copy, resumed=start.checkpoint is not None)
        digests, tokenizer = datasets.digests(), datasets.tokenizer
    stream = distributed.share_stream(datasets.stream if datasets else None)
    val_sequences = distributed.broadcast_tensor(datasets.val_sequences if datasets else None)
    val_bytes = distributed.broadcast_object(lambda: datasets.val_bytes if datasets else 0)

    model = distributed.build_model(config.model, config.seed, device)
    if config.zero_init and config.init is None:
        zero_outputs(model)
    model.grad_checkpointing = config.grad_checkpointing
    teacher = None
    if config.distill.teacher is not None:
        teacher = open_teacher(config.distill.teacher, config.model.vocab_size, device)
        digests["teacher"] = digest(teacher)
    if config.distill.attention_only:
        attention_only(model)
    loss_scale = LossScale(device) if capability(device).precision(config.precision) == "float16" else None
    keep = {"keep_last": config.keep_last, "keep_every": config.keep_every}
    t = Training(
        model=model,
        optimizer=make_optimizer(model, config.optim, distributed.optimizer_parameters(model)),
        balancer=Balancer(model, config.balance.gamma),
        stream=stream,
        guard=Guard(config.guard),
        distributed=distributed,
        loss_scale=loss_scale,
        config=config,
        run=run,
        device=device,
        datasets=datasets,
        val_sequences=val_sequences,
        val_bytes=val_bytes,
        forward_backward=ForwardBackward(
            model,
            partial(losses, z_loss=config.optim.z_loss, teacher=teacher),
            autocast(config.precision, device),
            grad_accum=config.grad_accum,
            alpha=config.balance.alpha,
            accumulate=distributed.accumulates,
            scale=None if loss_scale is None else loss_scale.tensor,
        ),
        schedule=Schedule.of(config),
        input_digests=digests,
        saver=Saver(run, model, tokenizer, distributed, timeout=config.mesh.timeout, **keep),
        tracker=tracker,
        log=console.Log(run.log if distributed.is_main else os.devnull),
    )
    if start.checkpoint is not None:
        t.restore(start.checkpoint, data=True)
        if start.previous is not None:
            check_inputs(digests, start)
    else:
        if config.init is not None:
            t.load_weights(resolve(config.init))
        if config.distill.teacher is not None:
            t.progress.evaluated = -1  # evaluate before the first step, to log the initial divergence
    t.saved_step = t.progress.step
    return t


def open_datasets(config: TrainConfig, tokenizer_copy: Path | None = None, *, resumed: bool = False) -> Datasets:
    """Open the training and validation text of a run.

    Args:
        config: the run's settings.
        tokenizer_copy: a folder with the tokenizer of a resumed run, used if `config.tokenizer` has moved.
        resumed: whether the run is resumed, so that warnings about the text are not repeated.

    Raises:
        SmolseekError: for data that cannot be read or are too short, and for a tokenizer that is larger than the
            model's vocabulary or cannot encode the text.
    """
    if not config.model.eos_ids:
        raise SmolseekError("eos_token_id is not set, but it must separate documents: set --model.eos-token-id")
    eos_id = config.model.eos_ids[0]
    tokenizer = _open_tokenizer(config.tokenizer, tokenizer_copy)
    _require_vocabulary(tokenizer, config.model.vocab_size, new=config.init is None)
    if config.init is None:
        tokenizer = for_training(tokenizer, eos_id)
    encode = encoder(tokenizer)
    corpus = open_dataset(config.data, config.eval_tokens, tokenizer)
    if not resumed:
        spelling = Spelling(tokenizer, config.tokenizer)
        for text in sample(corpus.train):
            spelling.add([text])
        spelling.require()
        corpus.unspelled = spelling.lost
        if hint := corpus.report.separator_hint():
            console.warn(hint)
    stream = open_stream(
        corpus,
        encode,
        eos_id,
        seq_len=config.seq_len,
        seed=config.seed,
        val_fraction=config.data.val_fraction,
        min_tokens=config.step_tokens + 1,
    )
    sequences = build_sequences(corpus.validation, encode, eos_id, config.seq_len, config.eval_tokens)
    size = int(token_bytes(tokenizer)[sequences[:, 1:].numpy()].sum())
    return Datasets(tokenizer, encode, corpus, stream, sequences, size)


def _require_vocabulary(tokenizer: Any, vocab_size: int, new: bool) -> None:
    """Raise SmolseekError if a model, `new` or already trained, has fewer tokens than its tokenizer."""
    size = len(tokenizer)
    if size > vocab_size:
        first = tokenizer.convert_ids_to_tokens(vocab_size)
        remedy = (
            f"use --model.vocab-size {size} or another --tokenizer"
            if new
            else f"give a --tokenizer of at most {vocab_size} tokens, or enlarge the model first "
            f"(transformers: model.resize_token_embeddings({size}))"
        )
        raise SmolseekError(
            f"the tokenizer has {size} tokens, but the model's vocab_size is {vocab_size} ({first!r} does not fit): "
            f"{remedy}"
        )


def _open_tokenizer(name: str, copy: Path | None) -> Any:
    try:
        return load_tokenizer(name)
    except SmolseekError as error:
        if copy is None:
            raise
        try:
            tokenizer = load_tokenizer(str(copy))
        except SmolseekError:
            raise error from None
        console.warn(f"the tokenizer of this run, {name}, does not exist any more: using its copy in {copy}")
        return tokenizer
