"""Provides calibration text and a Llama's attention statistics on this text, to which a smaller cache is fitted.

Shapes: T tokens of a sequence, D hidden_size, H query heads, G key/value heads.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from smolseek import console
from smolseek.data.sequences import TooFewTokens, build_sequences
from smolseek.data.sources import read_documents
from smolseek.data.split import is_validation
from smolseek.errors import SmolseekError
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.model.attention import GQA
from smolseek.model.transformer import CausalLM
from smolseek.ops.mla_attention import CosSin
from smolseek.ops.rotary import rotate
from smolseek.storage.hf_folder import load_causal_lm, read_config
from smolseek.tokenizer import begin_ids, encoder, require_known, tokenizer_of

_VALIDATION_SHARE = 0.1
_WINDOW = 512
_SAMPLES = 2
_BATCH_SIZE = 16
"""Number of sequences that the source model generates at a time."""


@dataclass
class Statistics:
    """Statistics of one layer on the calibration text."""

    moment_DD: torch.Tensor
    """Second moment of the attention's input."""
    attended_DD: torch.Tensor
    """Second moment of the attention's input. A token's weight is 1/2 plus half of the attention that it receives."""
    distance_HT: torch.Tensor
    """Sum of each head's attention by distance, without the attention to the first token (the attention sink)."""
    sample_NTD: torch.Tensor
    """Inputs of the attention on the first few sequences."""


@torch.no_grad()
def statistics(model: CausalLM, sequences: torch.Tensor) -> list[Statistics]:
    """Return the statistics of every layer of the Llama `model` on `sequences` [N, T+1]."""
    config, T, D = model.config, sequences.shape[1] - 1, model.config.hidden_size
    heads, size, tokens = config.num_attention_heads, config.qk_head_dim, sequences[:, :-1].numel()
    future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = []
    for _ in range(config.num_hidden_layers):
        sums = torch.zeros(D, D).double(), torch.zeros(D, D).double(), torch.zeros(heads, T).double()
        out.append(Statistics(*sums, torch.empty(0, T, D)))

    def add(attention: GQA, stats: Statistics, x_BTD: torch.Tensor, cos_sin: CosSin) -> None:
        x_TD = x_BTD[0]
        if len(stats.sample_NTD) < _SAMPLES:
            stats.sample_NTD = torch.cat((stats.sample_NTD, x_BTD))
        stats.moment_DD += (x_TD.T @ x_TD).double() / tokens
        q_HTd, k_GTd = (
            rotate(project(x_TD).unflatten(-1, (-1, size)).transpose(0, 1), *cos_sin, interleave=False)
            for project in (attention.q_proj, attention.k_proj)
        )
        k_HTd = k_GTd.repeat_interleave(heads // len(k_GTd), dim=0)
        p_HTT = (q_HTd @ k_HTd.mT * size**-0.5).masked_fill(future_TT, -torch.inf).softmax(dim=-1)
        weight_T = 0.5 + 0.5 * p_HTT.sum(dim=(0, 1)) / heads
        stats.attended_DD += ((x_TD.T * weight_T) @ x_TD).double() / tokens
        p_HTT[:, :, 0] = 0
        stats.distance_HT += _by_distance(p_HTT).double()

    layers: Any = model.model.layers
    attentions = [layer.self_attn for layer in layers]
    observed = [(module, partial(add, module, stats)) for module, stats in zip(attentions, out, strict=True)]
    observe(model, sequences, "calibrating", observed)
    return out


def observe(
    model: CausalLM,
    sequences: torch.Tensor,
    description: str,
    observed: Iterable[tuple[nn.Module, Callable[..., None]]],
) -> None:
    """Run the model over `sequences` [N, T+1], one at a time, and call each module's function with its inputs.

    Raises SmolseekError if the model's hidden states are not finite.
    """
    with contextlib.ExitStack() as stack, console.progress(len(sequences), description) as bar:
        for module, function in observed:
            hook = module.register_forward_pre_hook(lambda _, inputs, call=function: call(*inputs[:2]))
            stack.callback(hook.remove)
        for done, sequence in enumerate(sequences, 1):
            if not model.hidden(sequence[None, :-1]).hidden_BTD.isfinite().all():
                raise SmolseekError("the source model computes numbers that are not finite: copy or download it again")
            bar.update(done)


def _by_distance(p_HTT: torch.Tensor) -> torch.Tensor:
    """Return the sums [H, T] of the attention weights `p_HTT` along the diagonals.

    Rows are shifted so that diagonals become columns.
    """
    T = p_HTT.shape[-1]
    wide = F.pad(p_HTT.flip(-1), (0, T)).flatten(1)[:, : T * (2 * T - 1)]
    return wide.unflatten(1, (T, 2 * T - 1)).sum(dim=1)[:, T - 1 :]


def calibration_sequences(
    path: Path,
    calibration: str,
    tokens: int,
    seed: int,
    tokenizer: Any = None,
    text_column: str = "text",
    *,
    held_out: bool = False,
) -> torch.Tensor:
    """Return sequences [N, T+1] of calibration text for the model at `path`, with at most `tokens` predicted tokens.

    `calibration` is `builtin`, `self` (the model generates the text with `seed`), or a file or folder. `text_column` is
    the column or JSON key that holds the text. `tokenizer` replaces the model's own tokenizer. If `held_out` is set,
    the text comes from a tenth of the documents, which is not used for calibration.

    Raises:
        SmolseekError: if the model has no tokenizer, or if the text is too short.
    """
    tokenizer = tokenizer or tokenizer_of(path)
    if calibration == "self":
        return written_sequences(load_causal_lm(path), tokenizer, tokens, seed + 1 if held_out else seed)
    config = read_config(path)
    if tokenizer is None:
        raise SmolseekError(f"{path} has no tokenizer for the calibration text: put its tokenizer.json into the folder")
    length = min(_WINDOW, config.max_position_embeddings - 1, tokens)
    documents = [
        t for t in read_documents([calibration], text_column) if is_validation(t, _VALIDATION_SHARE) == held_out
    ]
    try:
        sequences = build_sequences(documents, encoder(tokenizer), tokenizer.eos_token_id or 0, length, tokens)
    except TooFewTokens:
        share = "the held-out tenth" if held_out else "nine tenths"
        raise SmolseekError(
            f"--calibration {calibration} is too short: {share} of its documents contain fewer tokens than one "
            f"window ({length:,} tokens), so give more documents, or use builtin"
        ) from None
    require_known(int(sequences.max()), tokenizer, config.vocab_size)
    return sequences


def written_sequences(model: CausalLM, tokenizer: Any, tokens: int, seed: int) -> torch.Tensor:
    """Return sequences [N, T+1] that `model` generates at temperature 1.

    Each sequence starts with BOS if the tokenizer adds BOS to a text, else with an end token.
    """
    length = min(_WINDOW, model.config.max_position_embeddings - 1, tokens)
    start = (begin_ids(tokenizer) if tokenizer else []) or [*model.config.eos_ids, 0][:1]
    count = max(tokens // length, 1)
    console.say(f"The source model generates {count * length:,} tokens of calibration text")
    params = [SamplingParams(temperature=1.0, seed=seed * 100_003 + n) for n in range(count)]  # seeds differ
    sequences: list[list[int]] = []
    with console.progress(count, "writing") as bar:
        for n in range(0, count, _BATCH_SIZE):
            batch = params[n : n + _BATCH_SIZE]
            generator = Generator(model, [start] * len(batch), batch, length + 1 - len(start))
            sequences += [[*start, *result.tokens] for result in generator.finish()]
            bar.update(len(sequences))
    return torch.tensor(sequences)
