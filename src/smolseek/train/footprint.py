"""How much memory a training run will take, part by part, before it is run.

What a step holds follows from the code that makes it: `model/` for what each operation keeps for the backward pass
(autograd keeps what a derivative reads), `train/loss.py` for the head's buffers, `train/optim.py` for the state, and
`storage/saver.py` for the copy that is written to the disk. tests/train/test_footprint.py counts the same bytes at
torch's allocator, bench/memory.py compares the sum with real runs.

Letters: N tokens of a micro-batch, D hidden_size, V vocab_size, a bytes of a product's number (2 under bfloat16
autocast, where weights, gradients and the residual stream stay float32; else 4).
"""

from dataclasses import dataclass
from typing import Any

import torch

from smolseek.config import ModelConfig, OptimConfig
from smolseek.model.recompute import How
from smolseek.model.summary import size_text
from smolseek.model.transformer import CausalLM
from smolseek.ops.backend import c_supports
from smolseek.ops.cross_entropy import held_bytes, logits_bytes
from smolseek.ops.mla_attention import c_supports_heads
from smolseek.train.device import autocast
from smolseek.train.optim import parameter_groups

PROGRAM = 380_000_000
"""Python, torch, the programs that oneDNN writes, the tokenizer and the built-in text, as one process holds them."""
# The audit's probe (audit/causality.py): logits of 3 x 48 tokens in float64, four of them at a time.
_PROBE = 3 * 48 * 8 * 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the memory of a run, beside the model."""

    batch_size: int = 4
    grad_accum: int = 1
    seq_len: int = 256
    grad_checkpointing: How = "none"
    bfloat16: bool = True
    optimizer: str = "adamw"
    cuda: bool = False

    @classmethod
    def planned(cls, *, precision: str, device: str, **rest: Any) -> "Run":
        """Return the run that `smolseek train` makes of these options on this machine; cuda need not be here."""
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            half = precision != "float32"
        else:
            half = isinstance(autocast(precision, torch.device("cuda" if cuda else "cpu")), torch.autocast)
        return cls(bfloat16=half, cuda=cuda, **rest)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def number(self) -> int:
        """Bytes of a product's number."""
        return 2 if self.bfloat16 else 4


@dataclass(frozen=True, kw_only=True)
class Half:
    """Bytes that half a layer keeps for each token, the residual stream that it reads included."""

    whole: int
    """Without recomputation."""
    selected: int
    """With selective recomputation."""


def lines(config: ModelConfig, run: Run) -> list[str]:
    """Return the footprint as text."""
    parts = footprint(config, run)
    how = f"recomputation {run.grad_checkpointing}, {'bfloat16' if run.bfloat16 else 'float32'}, {run.optimizer}"
    head = f"Memory to train at {run.batch_size} x {run.seq_len} tokens, {run.grad_accum} a step, {how}"
    said = [f"{head}: {size_text(sum(parts.values()))} at the peak"]
    said += [f"  {name:16}{size_text(size):>10}" for name, size in parts.items() if size]
    return said


def footprint(config: ModelConfig, run: Run) -> dict[str, int]:
    """Return the bytes of each part at the peak of a training run; their sum is the peak.

    They are the bytes that torch holds on the device. On a CPU, where the process's resident memory is meant,
    the copy that checkpoints are written from, the program itself and malloc's gaps are added: gradients that appear
    while activations go do not fit where those were, for a matrix is larger than most of them, nor the head's buffers
    where they were in the step before, for something that stays has taken a piece of it.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    size = sum(p.numel() for p in model.parameters())
    weights = 4 * size + sum(b.numel() * b.element_size() for b in model.buffers())
    state = _optimizer_state(model, run.optimizer)
    moments = _moments(config, run, model)
    parts = max(moments, key=lambda parts: sum(parts.values()))
    found = {"weights": weights, "gradients": 0, "optimizer": state, **parts}
    if run.cuda:
        # What a CUDA graph writes into serves nothing else: neither the first pass's gradients, which later ones are
        # added to, nor an evaluation.
        found["gradients"] += 4 * size if run.grad_accum > 1 else 0
        found["evaluation"] = logits_bytes(run.tokens, config.vocab_size, bfloat16=run.bfloat16)
    else:
        gaps = 4 * size - found["gradients"] + moments[0]["head"]
        found |= {"gaps": gaps, "checkpoint copy": weights + state, "program": PROGRAM}
    audit = {"weights": weights, "audit": 8 * size + _PROBE * config.vocab_size}
    if not run.cuda:
        audit["program"] = PROGRAM
    return max(found, audit, key=lambda parts: sum(parts.values()))


def _moments(config: ModelConfig, run: Run, model: CausalLM) -> list[dict[str, int]]:
    """Return what is held beside weights and optimizer state at the moments of a step that can be its peak."""
    N, a, how = run.tokens, run.number, run.grad_checkpointing
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    size = sum(p.numel() for p in model.parameters())
    kept = before = 0
    for layer in range(L):
        halves = attention_half(config, run), feed_half(config, run, layer)
        whole = N * sum(half.whole for half in halves)
        kept += {"none": whole, "selective": N * sum(half.selected for half in halves), "full": N * 4 * D}[how]
        # What is computed again before a layer's backward pass: all of it, or the larger of its halves.
        again = {
            "none": 0,
            "selective": N * max(half.whole - half.selected for half in halves),
            "full": whole - N * 4 * D,
        }[how]
        before = max(before, again)
    cached, recast = _casts(config, run, model)
    kept += N * D * (8 if run.cuda else 12) + (cached + recast if how == "none" else 0)
    # Gradients on their way, in float32: of the residual stream, and of what each expert of a token made.
    routed = config.num_experts_per_tok if config.n_moe_layers else 0
    on_the_way = N * D * 4 * (1 + routed)
    # On a CPU the loop adds the gradients of gated experts, head and embedding in place (`ops/backend.py`). Else
    # new ones lie beside the old ones until they are added; the parts of a stack until it is made. On a GPU each pass
    # makes all of them anew (`train/forward_backward.py`).
    stacks = [4 * p.numel() for name, p in model.model.layers[L - 1].named_parameters() if ".experts." in name]
    if not config.mlp_gated and not run.cuda:
        on_the_way += sum(stacks) if run.grad_accum > 1 else max(stacks, default=0)
    head = V * D * 4
    earlier = 4 * size if run.grad_accum > 1 and not run.cuda else 0
    new = earlier or head
    return [
        {
            "gradients": earlier,
            "activations": kept + (0 if how == "none" else cached),
            "head": held_bytes(N, V, D, bfloat16=run.bfloat16, cuda=run.cuda, earlier=bool(earlier)),
        },
        {
            "gradients": new,
            "activations": kept + before,
            "buffers": N * D * a + on_the_way,
        },
        {
            # The first layer, last in the backward pass: only an embedding of its own has no gradient yet.
            "gradients": 4 * size - (0 if earlier or config.tie_word_embeddings else head),
            "activations": before,
            "buffers": on_the_way,
        },
        {
            # A tied embedding has two gradients until they are added.
            "gradients": 4 * size,
            "buffers": N * D * 4 + (head if run.cuda and config.tie_word_embeddings else 0),
        },
        {"gradients": 4 * size, "buffers": _muon_buffers(model) if run.optimizer == "muon" else 0},
    ]


def attention_half(config: ModelConfig, run: Run) -> Half:
    """Return what norm and attention keep for each token (`model/attention.py`)."""
    a, D, H = run.number, config.hidden_size, config.num_attention_heads
    in_c = False
    if config.is_mla:
        L, R, Q, X = config.kv_lora_rank or 0, config.qk_rope_head_dim, config.qk_head_dim, config.v_head_dim
        in_c = not run.cuda and c_supports_heads(_like(run), Q - R, R, X)
        kept = _norm(D, run, readers=2) + _latent(L, R, run, config.latent_norm)
        if config.q_lora_rank:
            kept += _latent(config.q_lora_rank, 0, run, True)
        # The query, and what the latent became; of that only the value where a GPU puts the key together.
        kept += a * H * (Q + X if run.cuda and run.bfloat16 else Q + Q - R + X)
        if not in_c:
            kept += a * H * Q  # the key, put together
        elif config.latent_norm:
            kept += a * (L + R)  # the key with position, as it was projected
    else:
        Q = X = config.qk_head_dim
        kept = _norm(D, run, readers=3) + a * (H + 2 * config.num_key_value_heads) * Q
    result = a * H * X + 4 * H  # and the logarithm of each row's sum
    # PyTorch's kernel for a CPU puts the heads first: the output projection reads a copy.
    copy = 0 if run.cuda or in_c else a * H * X
    return Half(whole=4 * D + kept + result + copy, selected=4 * D + result)


def feed_half(config: ModelConfig, run: Run, layer: int) -> Half:
    """Return what norm and feed-forward layer keep for each token (`model/moe.py`)."""
    a, D = run.number, config.hidden_size
    # Of SwiGLU: gate, up and their product, and without the C kernel the activation.
    swiglu = (3 if not run.cuda and c_supports(_like(run)) else 4) * a
    if not config.is_moe_layer(layer):
        F = config.intermediate_size
        # Selected are the three products, the last one without need.
        return Half(whole=4 * D + _norm(D, run, readers=2) + swiglu * F, selected=4 * D + 2 * a * F + a * D)
    E, K, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    shared = F * config.n_shared_experts if config.mlp_gated else 0
    kept = _norm(D, run, readers=2 if shared else 0, precise=True)
    kept += 3 * 4 * E + 5 * 8 * K  # the router's scores, the choice and its orders
    kept += a * K * D * 2 + swiglu * shared  # the experts' inputs and results, the shared experts
    first = (2 if config.mlp_gated else 1) * a * K * F
    looped = config.mlp_gated and not run.cuda  # computes the activation again by itself
    activated = 0 if looped else a * K * F
    selected = first + a * K * D + 4 * E + (2 * a * shared + a * D if shared else 0)
    return Half(whole=4 * D + kept + first + activated, selected=4 * D + selected)


def _like(run: Run) -> torch.Tensor:
    """Return a tensor of the products' type, to ask the passes in C whether they fit."""
    return torch.empty(0, dtype=torch.bfloat16 if run.bfloat16 else torch.float32)


def _norm(D: int, run: Run, *, readers: int, precise: bool = False) -> int:
    """Return what a norm of D features and the products that read it keep: a cast for each, or the float32 numbers.

    `precise`: something reads them in float32 even under autocast. A CPU's norm also keeps what it made before the
    weights came in.
    """
    read = readers * 2 * D + (4 * D if precise else 0) if run.bfloat16 else 4 * D
    return read + (0 if run.cuda else 4 * D)


def _latent(rank: int, beside: int, run: Run, normed: bool) -> int:
    """Return what a latent of `rank` features, projected with `beside` others, keeps on its way through its norm."""
    a = run.number
    if not normed:
        return a * (rank + beside)
    given = 4 * rank if run.bfloat16 else 4 * (rank + beside)
    return given + (0 if run.cuda else 4 * rank) + a * rank


def _casts(config: ModelConfig, run: Run, model: CausalLM) -> tuple[int, int]:
    """Return the bytes of cast weights: those that autocast keeps to its end, and those that only backward needs."""
    if not run.bfloat16:
        return 0, 0
    cached = recast = 0
    for name, parameter in model.model.layers.named_parameters():
        if ".experts." in name:
            recast += 0 if config.mlp_gated and not run.cuda else 2 * parameter.numel()
        elif parameter.ndim == 2 and not name.endswith("mlp.gate.weight"):
            cached += 2 * parameter.numel()
    return cached, recast


def _optimizer_state(model: CausalLM, optimizer: str) -> int:
    """Return the bytes of AdamW's two moments, or of Muon's one where it steps."""
    groups = parameter_groups(model, OptimConfig(kind=optimizer))  # type: ignore[arg-type]
    return sum(p.numel() * (4 if group.get("parts") else 8) for group in groups for p in group["params"])


def _muon_buffers(model: CausalLM) -> int:
    """Return what Muon holds while it orthogonalizes the largest stack: in float32 once, in bfloat16 four times."""
    return (4 + 4 * 2) * max(p.numel() for p in model.model.layers.parameters())
