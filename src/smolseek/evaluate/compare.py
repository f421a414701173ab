"""How far two models are apart: losses, Kullback-Leibler divergence, agreement, on the same tokens.

Shapes: N sequences, T tokens, D hidden_size, C tokens of a chunk, V vocab_size.
"""

import itertools
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from smolseek import console
from smolseek.data.sequences import TooFewTokens, build_sequences
from smolseek.data.sources import read_documents
from smolseek.errors import SmolseekError
from smolseek.model.summary import count
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_causal_lm, read_config, resolve, save_folder
from smolseek.storage.stock_transformers import open_with_transformers
from smolseek.tokenizer import encoder, require_known, tokenizer_of

Engine = Literal["native", "transformers"]

# Positions whose logits exist at one time, for both models.
_CHUNK = 64


@dataclass(frozen=True)
class Comparison:
    """Two models, A and B, on the same tokens."""

    tokens: int
    """Tokens predicted."""
    loss_a: float
    """Mean cross-entropy of A, in nats."""
    loss_b: float
    """Mean cross-entropy of B, in nats."""
    kl: float
    """Mean KL(A || B) per token, in nats."""
    agreement: float
    """Share of tokens with the same likeliest next token."""
    max_difference: float
    """Largest difference of two logits, in standard deviations of A's logits."""
    rms_difference: float
    """Root mean square difference of two logits, in standard deviations of A's logits."""

    def line(self) -> str:
        """Return the comparison in one line."""
        return (
            f"mean KL {self.kl:.1e} nats per token, top-1 agreement {self.agreement:.2%}, largest logit difference "
            f"{self.max_difference:.1e} of their spread, loss {self.loss_a:.5f} before and {self.loss_b:.5f} after "
            f"({self.tokens:,} tokens)"
        )


@torch.no_grad()
def hidden_states(model: Any, sequences: torch.Tensor) -> Iterable[torch.Tensor]:
    """Yield the last hidden states [T, D] of each of `sequences` [N, T+1], for our models and transformers'."""
    for sequence in sequences:
        ids = sequence[None, :-1]
        out = model.hidden(ids).hidden_BTD if isinstance(model, CausalLM) else model.model(ids).last_hidden_state
        yield out[0]


@torch.no_grad()
def compare_states(
    states_a: Iterable[torch.Tensor],
    head_a: torch.Tensor,
    states_b: Iterable[torch.Tensor],
    head_b: torch.Tensor,
    sequences: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> Comparison:
    """Compare two models by the hidden states of `sequences` [N, T+1] and their heads [V, D].

    In float32 it is faster, and right to about 1e-6 nats.
    """
    sums, largest = [0.0] * 7, 0.0
    with console.progress(len(sequences), "comparing") as bar:
        for done, (a_TD, b_TD, sequence) in enumerate(zip(states_a, states_b, sequences, strict=True), 1):
            for start in range(0, len(a_TD), _CHUNK):
                part = slice(start, start + _CHUNK)
                a_CV, b_CV = (a_TD[part] @ head_a.T).to(dtype), (b_TD[part] @ head_b.T).to(dtype)
                sums = [total + more for total, more in zip(sums, _sums(a_CV, b_CV, sequence[1:][part]), strict=True)]
                largest = max(largest, float((a_CV - b_CV).abs().max()))
            bar.update(done)
    tokens = sequences[:, 1:].numel()
    loss_a, loss_b, kl, agreement = (total / tokens for total in sums[:4])
    mean, square, difference_square = (total / (tokens * len(head_a)) for total in sums[4:])
    spread = math.sqrt(max(square - mean**2, 0.0)) or 1.0
    rms = math.sqrt(difference_square) / spread
    return Comparison(tokens, loss_a, loss_b, kl, agreement, max_difference=largest / spread, rms_difference=rms)


def _sums(a_CV: torch.Tensor, b_CV: torch.Tensor, targets_C: torch.Tensor) -> list[float]:
    """Return sums over a chunk: both losses, KL, agreement; A's logits, their squares, the squared differences."""
    logp_CV, logq_CV = a_CV.log_softmax(dim=-1), b_CV.log_softmax(dim=-1)
    return [
        -float(logp_CV.gather(1, targets_C[:, None]).sum()),
        -float(logq_CV.gather(1, targets_C[:, None]).sum()),
        float((logp_CV.exp() * (logp_CV - logq_CV)).sum()),
        float((a_CV.argmax(dim=-1) == b_CV.argmax(dim=-1)).sum()),
        float(a_CV.sum()),
        float(a_CV.square().sum()),
        float((a_CV - b_CV).square().sum()),
    ]


def compare(a: Any, b: Any, sequences: torch.Tensor) -> Comparison:
    """Compare models A and B, ours or transformers', on `sequences` [N, T+1].

    Raises:
        SmolseekError: if the logits of one are not finite.
    """
    states = hidden_states(a, sequences), hidden_states(b, sequences)
    found = compare_states(states[0], a.lm_head.weight, states[1], b.lm_head.weight, sequences)
    for name, loss in (("first", found.loss_a), ("second", found.loss_b)):
        if not math.isfinite(loss):
            raise SmolseekError(
                f"the {name} model's logits are not finite: its weights are damaged, or too large for their number "
                "format: try --dtype float32, or take another checkpoint"
            )
    return found


def text_sequences(
    sources: Iterable[str],
    text_column: str,
    tokenizer: Any,
    seq_len: int,
    max_tokens: int,
    documents: int | None = None,
) -> torch.Tensor:
    """Return sequences [N, T+1] of the text in `sources`, in an order that depends on the documents alone.

    `documents` is how many of them are read; None reads all.

    Raises:
        SmolseekError: if there is no such text, or too little of it for one sequence.
    """
    if tokenizer is None:
        raise SmolseekError("neither model has a tokenizer: put a tokenizer.json into one of the folders")
    texts = itertools.islice(read_documents(list(sources), text_column), documents)
    try:
        return build_sequences(texts, encoder(tokenizer), tokenizer.eos_token_id or 0, seq_len, max_tokens)
    except TooFewTokens as error:
        raise SmolseekError(
            f"the text holds {error.held:,} tokens and one window takes {seq_len + 1:,}: give more, or lower --seq-len"
        ) from None


def verify_conversion(source: Path, out: Path, tokens: int = 512) -> str:
    """Open both models natively, one after the other, and return the line of fidelity.

    They read built-in text, or random tokens where there is no tokenizer. In bfloat16 the source with its weights
    rounded likewise is the measure of what may be lost.

    Raises:
        SmolseekError: if the converted model is further from the source than its number format explains.
    """
    original = load_causal_lm(source)
    vocab, length = original.config.vocab_size, min(tokens, original.config.max_position_embeddings - 1)
    tokenizer = tokenizer_of(out)
    if tokenizer is None:
        sequences = torch.randint(vocab, (1, length + 1), generator=torch.Generator().manual_seed(0))
    else:
        sequences = text_sequences(["builtin"], "text", tokenizer, length, length, documents=40)
        require_known(int(sequences.max()), tokenizer, vocab)
    before, head = list(hidden_states(original, sequences)), original.lm_head.weight.detach()
    converted = load_causal_lm(out, dtype="auto")
    allowed, note = 1e-6, ""
    if converted.lm_head.weight.dtype == torch.bfloat16:
        head = head.clone()
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.copy_(parameter.bfloat16())
        rounded = compare_states(before, head, hidden_states(original, sequences), original.lm_head.weight, sequences)
        allowed = max(allowed, 2 * rounded.kl)
        note = f"; rounding the original to bfloat16 gives mean KL {rounded.kl:.1e}"
    del original
    converted = converted.float()
    found = compare_states(before, head, hidden_states(converted, sequences), converted.lm_head.weight, sequences)
    if not found.kl <= allowed:
        raise SmolseekError(
            f"the converted model is not faithful: mean KL {found.kl:.1e} is above {allowed:.1e} ({found.line()}): "
            "please report this; --no-verify writes the model nevertheless"
        )
    return f"Fidelity: {found.line()}{note}"


def measure_conversion(source: Path, out: Path, sequences: torch.Tensor) -> str:
    """Open both models natively, one after the other, and return the line of how far they are apart.

    Raises:
        SmolseekError: if the converted model is broken: not finite, or no better than a guess.
    """
    original = load_causal_lm(source)
    before, head = list(hidden_states(original, sequences)), original.lm_head.weight.detach()
    del original
    model = load_causal_lm(out)
    found = compare_states(before, head, hidden_states(model, sequences), model.lm_head.weight, sequences)
    guess = max(math.log(model.config.vocab_size), found.loss_a) + 1
    if not found.loss_b < guess:
        raise SmolseekError(
            f"the converted model is broken: {found.line()}, and a guess has {guess - 1:.2f}: keep more of the cache; "
            "--no-verify writes the model nevertheless"
        )
    return f"Distance: {found.line()}, perplexity {math.exp(found.loss_b - found.loss_a) - 1:+.1%}"


class Pair(NamedTuple):
    """Two models that can be compared, before their weights are read."""

    paths: list[Path]
    """Their folders or .gguf files."""
    context: int
    """Tokens that both have positions for."""
    vocab_size: int
    """Tokens that both know."""
    tokenizer: Any
    """The first one's, or else the second one's; None where neither has one."""

    def sequences(self, sources: Iterable[str], text_column: str, seq_len: int, max_tokens: int) -> torch.Tensor:
        """Return what `text_sequences` does.

        Raises:
            SmolseekError: as `text_sequences`, for a sequence that the models have no positions for, or for a token
                that they do not have.
        """
        if not 1 <= seq_len <= self.context:
            raise SmolseekError(
                f"--seq-len {seq_len:,} is not between 1 and {self.context:,}, the positions that both models have: "
                "change it"
            )
        if max_tokens < seq_len:
            raise SmolseekError(
                f"--tokens {max_tokens:,} do not fill a window of {seq_len:,}: raise them, or lower --seq-len"
            )
        sequences = text_sequences(sources, text_column, self.tokenizer, seq_len, max_tokens)
        require_known(int(sequences.max()), self.tokenizer, self.vocab_size)
        return sequences


def find_models(a: str, b: str) -> Pair:
    """Find both models.

    Raises:
        SmolseekError: if one cannot be found, or they do not have the same vocabulary.
    """
    paths, configs = [resolve(a), resolve(b)], [read_config(a), read_config(b)]
    if configs[0].vocab_size != configs[1].vocab_size:
        raise SmolseekError(
            f"{a} has {configs[0].vocab_size:,} tokens and {b} {configs[1].vocab_size:,}: "
            "only models with one vocabulary are compared"
        )
    tokenizers = [tokenizer for path in paths if (tokenizer := tokenizer_of(path)) is not None]
    if len(tokenizers) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise SmolseekError(f"{a} and {b} have different tokenizers: only models with one vocabulary are compared")
    context = min(config.max_position_embeddings for config in configs)
    return Pair(paths, context, configs[0].vocab_size, next(iter(tokenizers), None))


def open_model(path: Path, engine: Engine, dtype: str) -> Any:
    """Open the folder or .gguf file `path` with our engine or with stock transformers.

    Raises:
        SmolseekError: if that engine cannot open it.
    """
    if engine == "native":
        return load_causal_lm(path, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file():
            # transformers reads GGUF files only beside another package; the Llama folder has the same weights.
            save_folder(load_causal_lm(path), folder)
        place = Path(folder) if path.is_file() else path
        return open_with_transformers(place, getattr(torch, dtype), str(path), "try --engine native")


def sides(names: tuple[str, str], found: Comparison) -> list[dict[str, Any]]:
    """Return of each model its name, loss, bytes cached per token (in 16 bits), parameters, and those a token uses."""
    both = []
    for name, loss in zip(names, (found.loss_a, found.loss_b), strict=True):
        config = read_config(name)
        counts, cached = count(config), 2 * config.num_hidden_layers * config.cache_features
        both.append({"name": name, "loss": loss, "cache_bytes": cached, "total": counts.total, "active": counts.active})
    return both


def report(names: tuple[str, str], found: Comparison) -> list[str]:
    """Return the comparison as a table of text."""
    a, b = sides(names, found)
    rows = [
        ("", a["name"], b["name"]),
        ("loss (nats per token)", f"{found.loss_a:.5f}", f"{found.loss_b:.5f}"),
        ("cache per token (16 bits)", f"{a['cache_bytes']:,} bytes", f"{b['cache_bytes']:,} bytes"),
        ("parameters", f"{a['total']:,}", f"{b['total']:,}"),
        ("active per token", f"{a['active']:,}", f"{b['active']:,}"),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        *(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows),
        "",
        f"mean KL(A||B)             {found.kl:.3e} nats per token",
        f"top-1 agreement           {found.agreement:.3%}",
        f"largest logit difference  {found.max_difference:.2e} of the standard deviation of A's logits",
        f"tokens                    {found.tokens:,}",
    ]
