"""Comparison of two models on the same tokens: losses, KL divergence, agreement of the predictions.

Shapes: N sequences, T tokens, D hidden_size, C tokens of a chunk, V vocab_size.
"""

import itertools
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

# Number of positions whose logits are in memory at a time, for both models.
_CHUNK = 64


@dataclass(frozen=True)
class Comparison:
    """Comparison of two models, A and B, on the same tokens."""

    tokens: int
    """Number of predicted tokens."""
    loss_a: float
    """Mean cross-entropy of A, in nats."""
    loss_b: float
    """Mean cross-entropy of B, in nats."""
    kl: float
    """Mean KL(A || B) per token, in nats."""
    agreement: float
    """Share of positions where both models have the same most likely next token."""
    max_difference: float
    """Largest difference between a logit of A and of B, in standard deviations of A's logits."""
    rms_difference: float
    """Root mean square of the differences between the logits of A and B, in standard deviations of A's logits."""

    def line(self) -> str:
        """Return the comparison in one line."""
        return (
            f"mean KL {self.kl:.1e} nats/token, top-1 agreement {self.agreement:.2%}, largest logit difference "
            f"{self.max_difference:.1e} standard deviations, loss {self.loss_a:.5f} before and {self.loss_b:.5f} after "
            f"({self.tokens:,} tokens)"
        )


@torch.no_grad()
def hidden_states(model: Any, sequences: torch.Tensor) -> Iterable[torch.Tensor]:
    """Yield the last hidden states [T, D] of each sequence of `sequences` [N, T+1]; also takes transformers' models."""
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
    """Compare two models by their hidden states of `sequences` [N, T+1] and their heads [V, D].

    A `dtype` of float32 is faster, and exact to about 1e-6 nats.
    """
    loss_a = loss_b = kl = agreement = mean = square = difference_square = largest = 0.0
    with console.progress(len(sequences), "comparing") as bar:
        for done, (a_TD, b_TD, sequence) in enumerate(zip(states_a, states_b, sequences, strict=True), 1):
            for start in range(0, len(a_TD), _CHUNK):
                chunk = slice(start, start + _CHUNK)
                a_CV, b_CV = (a_TD[chunk] @ head_a.T).to(dtype), (b_TD[chunk] @ head_b.T).to(dtype)
                logp_CV, logq_CV = a_CV.log_softmax(dim=-1), b_CV.log_softmax(dim=-1)
                targets_C1, difference_CV = sequence[1:][chunk, None], a_CV - b_CV
                loss_a -= float(logp_CV.gather(1, targets_C1).sum())
                loss_b -= float(logq_CV.gather(1, targets_C1).sum())
                kl += float((logp_CV.exp() * (logp_CV - logq_CV)).sum())
                agreement += float((a_CV.argmax(dim=-1) == b_CV.argmax(dim=-1)).sum())
                mean += float(a_CV.sum())
                square += float(a_CV.square().sum())
                difference_square += float(difference_CV.square().sum())
                largest = max(largest, float(difference_CV.abs().max()))
            bar.update(done)
    tokens = sequences[:, 1:].numel()
    logits = tokens * len(head_a)
    std = math.sqrt(max(square / logits - (mean / logits) ** 2, 0.0)) or 1.0
    rms = math.sqrt(difference_square / logits)
    return Comparison(
        tokens, loss_a / tokens, loss_b / tokens, kl / tokens, agreement / tokens, largest / std, rms / std
    )


def compare(a: Any, b: Any, sequences: torch.Tensor) -> Comparison:
    """Compare the models A and B, which may be ours or transformers' models, on `sequences` [N, T+1].

    Raises:
        SmolseekError: if the logits of a model are not finite.
    """
    states = hidden_states(a, sequences), hidden_states(b, sequences)
    comparison = compare_states(states[0], a.lm_head.weight, states[1], b.lm_head.weight, sequences)
    for name, loss in (("first", comparison.loss_a), ("second", comparison.loss_b)):
        if not math.isfinite(loss):
            raise SmolseekError(
                f"the {name} model's logits are not finite: its weights are damaged, or too large for their number "
                "format: try --dtype float32, or use another checkpoint"
            )
    return comparison


def text_sequences(
    sources: Iterable[str],
    text_column: str,
    tokenizer: Any,
    seq_len: int,
    max_tokens: int,
    documents: int | None = None,
) -> torch.Tensor:
    """Return sequences [N, T+1] of the text in `sources`, in an order that depends only on the documents.

    `documents` is the number of documents that are read; None reads all.

    Raises:
        SmolseekError: if there is no text, or too little text for one sequence.
    """
    if tokenizer is None:
        raise SmolseekError("neither model has a tokenizer: put a tokenizer.json into one of the folders")
    texts = itertools.islice(read_documents(list(sources), text_column), documents)
    try:
        return build_sequences(texts, encoder(tokenizer), tokenizer.eos_token_id or 0, seq_len, max_tokens)
    except TooFewTokens as error:
        raise SmolseekError(
            f"the text has {error.tokens:,} tokens, but a sequence takes {seq_len + 1:,}: give more text, or "
            "lower --seq-len"
        ) from None


def verify_conversion(source: Path, out: Path) -> str:
    """Compare a lossless conversion with its source, in float32, and return the result in one line.

    Both models read built-in text, or random tokens if there is no tokenizer. A converted model in bfloat16 may have
    twice the KL divergence that rounding the source to bfloat16 causes.

    Raises:
        SmolseekError: if the converted model differs by more than its number format explains.
    """
    original = load_causal_lm(source)
    vocab, length = original.config.vocab_size, min(512, original.config.max_position_embeddings - 1)
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
    comparison = compare_states(before, head, hidden_states(converted, sequences), converted.lm_head.weight, sequences)
    if not comparison.kl <= allowed:
        raise SmolseekError(
            f"the converted model is not faithful: mean KL {comparison.kl:.1e} is above {allowed:.1e} "
            f"({comparison.line()}): please report this; --no-verify writes the model nevertheless"
        )
    return f"Fidelity: {comparison.line()}{note}"


def measure_conversion(source: Path, out: Path, sequences: torch.Tensor) -> str:
    """Compare a lossy conversion with its source, and return the result in one line.

    Raises:
        SmolseekError: if the converted model is broken: its loss is not finite, or no better than with uniform logits.
    """
    original = load_causal_lm(source)
    before, head = list(hidden_states(original, sequences)), original.lm_head.weight.detach()
    del original
    model = load_causal_lm(out)
    comparison = compare_states(before, head, hidden_states(model, sequences), model.lm_head.weight, sequences)
    uniform = max(math.log(model.config.vocab_size), comparison.loss_a)
    if not comparison.loss_b < uniform + 1:
        raise SmolseekError(
            f"the converted model is broken ({comparison.line()}; the loss of uniform logits is "
            f"{uniform:.2f}): keep more "
            "of the cache; --no-verify writes the model nevertheless"
        )
    return f"Distance: {comparison.line()}, perplexity {math.exp(comparison.loss_b - comparison.loss_a) - 1:+.1%}"


def prepare(
    a: str, b: str, sources: Iterable[str], text_column: str, seq_len: int, max_tokens: int
) -> tuple[list[Path], torch.Tensor]:
    """Return the folders or .gguf files of the models `a` and `b`, and their `text_sequences`. No weights are read.

    Raises:
        SmolseekError: if a model is not found, the vocabularies differ, or the text or `seq_len` does not suit both.
    """
    paths, configs = [resolve(a), resolve(b)], [read_config(a), read_config(b)]
    vocab_size = configs[0].vocab_size
    if configs[1].vocab_size != vocab_size:
        raise SmolseekError(
            f"{a} has {vocab_size:,} tokens, but {b} has {configs[1].vocab_size:,}: compare models with the "
            "same vocabulary"
        )
    tokenizers = [tokenizer for path in paths if (tokenizer := tokenizer_of(path)) is not None]
    if len(tokenizers) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise SmolseekError(f"{a} and {b} have different tokenizers: compare models with the same vocabulary")
    context = min(config.max_position_embeddings for config in configs)
    if not 1 <= seq_len <= context:
        raise SmolseekError(
            f"--seq-len {seq_len:,} is not between 1 and {context:,}, the context of both models: change --seq-len"
        )
    if max_tokens < seq_len:
        raise SmolseekError(
            f"--tokens {max_tokens:,} is below the length of a sequence, {seq_len:,}: raise --tokens, or "
            "lower --seq-len"
        )
    tokenizer = next(iter(tokenizers), None)
    sequences = text_sequences(sources, text_column, tokenizer, seq_len, max_tokens)
    require_known(int(sequences.max()), tokenizer, vocab_size)  # type: ignore[arg-type]
    return paths, sequences


def open_model(path: Path, engine: str, dtype: str) -> Any:
    """Open the folder or .gguf file `path` with our engine or with stock transformers.

    Raises:
        SmolseekError: if the engine cannot open the model.
    """
    if engine == "native":
        return load_causal_lm(path, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file():
            # transformers needs another package for GGUF files, so a Llama folder with the same weights is written.
            save_folder(load_causal_lm(path), folder)
        opened = Path(folder) if path.is_file() else path
        return open_with_transformers(opened, getattr(torch, dtype), str(path), "try --engine native")


def describe(name: str, loss: float) -> dict[str, Any]:
    """Return a model's name, loss, cache per token (in bytes, 16 bits a number), parameters and active parameters."""
    config = read_config(name)
    counts, cache_bytes = count(config), 2 * config.num_hidden_layers * config.cache_features
    return {"name": name, "loss": loss, "cache_bytes": cache_bytes, "total": counts.total, "active": counts.active}


def report(comparison: Comparison, models: Iterable[dict[str, Any]]) -> list[str]:
    """Return the comparison as lines of text. `models` has the result of `describe` for both models."""
    a, b = models
    table = (
        ("", "A", "B"),
        ("loss (nats/token)", f"{a['loss']:.5f}", f"{b['loss']:.5f}"),
        ("cache per token (bytes, 16 bits)", f"{a['cache_bytes']:,}", f"{b['cache_bytes']:,}"),
        ("parameters", f"{a['total']:,}", f"{b['total']:,}"),
        ("active per token", f"{a['active']:,}", f"{b['active']:,}"),
    )
    return [
        f"A: {a['name']}",
        f"B: {b['name']}",
        "",
        *(f"{title:<34}{left:>16}{right:>16}" for title, left, right in table),
        "",
        f"mean KL(A||B)             {comparison.kl:.3e} nats/token",
        f"top-1 agreement           {comparison.agreement:.3%}",
        f"largest logit difference  {comparison.max_difference:.2e} standard deviations of A's logits",
        f"tokens                    {comparison.tokens:,}",
    ]
