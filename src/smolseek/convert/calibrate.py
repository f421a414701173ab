"""What a Llama's attention does on real text: the statistics that a smaller cache is fitted to.

Shapes: T tokens of a window, D hidden_size, H query heads, G key/value heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from smolseek import console
from smolseek.data.sequences import TooFewTokens, build_sequences
from smolseek.data.sources import read_documents
from smolseek.data.split import is_validation
from smolseek.errors import SmolseekError
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.model.transformer import CausalLM
from smolseek.ops.rotary import rotate
from smolseek.storage.hf_folder import load_causal_lm, read_config
from smolseek.tokenizer import begin_ids, encoder, require_known, tokenizer_of

_HELD_OUT = 0.1
_WINDOW = 512
_SAMPLED = 2
_LOT = 16
"""Texts that the source writes at a time."""


@dataclass
class Statistics:
    """Sums over the calibration text, of one layer."""

    moment_DD: torch.Tensor
    """Second moment of the attention's input."""
    attended_DD: torch.Tensor
    """The same with every token weighted by one half, and one half of the attention that it gets."""
    distance_HT: torch.Tensor
    """Attention of each head by distance; the first token, to which idle heads turn, is left out."""
    sample_NTD: torch.Tensor
    """The attention's inputs on the first windows."""


@torch.no_grad()
def statistics(model: CausalLM, rows: torch.Tensor) -> list[Statistics]:
    """Return the statistics of every layer of the Llama `model` on the windows `rows` [N, T+1]."""
    config, T = model.config, rows.shape[1] - 1
    heads, size = config.num_attention_heads, config.qk_head_dim
    unseen_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    D = config.hidden_size
    found = [
        Statistics(
            torch.zeros(D, D).double(), torch.zeros(D, D).double(), torch.zeros(heads, T).double(), torch.empty(0, T, D)
        )
        for _ in range(config.num_hidden_layers)
    ]

    def watch(attention, inputs) -> None:  # type: ignore[no-untyped-def]
        x_TD, (cos, sin) = inputs[0][0], inputs[1]
        into = found[attention.layer]
        if len(into.sample_NTD) < _SAMPLED:
            into.sample_NTD = torch.cat((into.sample_NTD, inputs[0]))
        into.moment_DD += (x_TD.T @ x_TD).double() / rows[:, :-1].numel()
        q_HTd, k_GTd = (
            rotate(p(x_TD).unflatten(-1, (-1, size)).transpose(0, 1), cos, sin, interleave=False)
            for p in (attention.q_proj, attention.k_proj)
        )
        k_HTd = k_GTd.repeat_interleave(heads // len(k_GTd), dim=0)
        p_HTT = (q_HTd @ k_HTd.mT * size**-0.5).masked_fill(unseen_TT, -torch.inf).softmax(dim=-1)
        weight_T = 0.5 + 0.5 * p_HTT.sum(dim=(0, 1)) / heads
        into.attended_DD += ((x_TD.T * weight_T) @ x_TD).double() / rows[:, :-1].numel()
        p_HTT[:, :, 0] = 0
        into.distance_HT += _by_distance(p_HTT).double()

    layers: Any = model.model.layers
    observe(model, rows, [layer.self_attn.register_forward_pre_hook(watch) for layer in layers], "calibrating")
    return found


NOT_FINITE = "what the source computes is not finite: its weights are damaged, so copy or download it anew"


def observe(model: CausalLM, rows: torch.Tensor, hooks: Sequence[RemovableHandle], doing: str) -> None:
    """Run the model over the windows `rows` [N, T+1], one at a time, for what `hooks` see, and remove these.

    Raises:
        SmolseekError: if what the model computes is not finite.
    """
    try:
        with console.progress(len(rows), doing) as bar:
            for done, row in enumerate(rows, 1):
                if not model.hidden(row[None, :-1]).hidden_BTD.isfinite().all():
                    raise SmolseekError(NOT_FINITE)
                bar.update(done)
    finally:
        for hook in hooks:
            hook.remove()


def _by_distance(p_HTT: torch.Tensor) -> torch.Tensor:
    """Return the sums [H, T] of `p_HTT` along its diagonals: rows are shifted until a distance is a column."""
    T = p_HTT.shape[-1]
    wide = F.pad(p_HTT.flip(-1), (0, T)).flatten(1)[:, : T * (2 * T - 1)]
    return wide.unflatten(1, (T, 2 * T - 1)).sum(dim=1)[:, T - 1 :]


def calibration_rows(
    path: Path, calibration: str, tokens: int, seed: int, tokenizer: Any = None, text_column: str = "text"
) -> torch.Tensor:
    """Return windows [N, T+1] of text for the model at `path`, which `tokenizer` reads, the model's own where None.

    `calibration` is `builtin`, `self` (the model writes it, sampling at temperature 1 from BOS or an end token on), or
    a file or folder, whose column or key `text_column` holds the text. A tenth of the documents is left for
    `held_out_rows`.

    Raises:
        SmolseekError: if the model has no tokenizer, or the text is too short.
    """
    return _rows(path, calibration, tokens, seed, tokenizer, text_column, held_out=False)


def held_out_rows(
    path: Path, calibration: str, tokens: int, seed: int, tokenizer: Any = None, text_column: str = "text"
) -> torch.Tensor:
    """Return windows of text of the same kind that `calibration_rows` never returns; raises as it does."""
    return _rows(path, calibration, tokens, seed + 1, tokenizer, text_column, held_out=True)


def _rows(
    path: Path, calibration: str, tokens: int, seed: int, tokenizer: Any, text_column: str, *, held_out: bool
) -> torch.Tensor:
    if calibration == "self":
        return _written(path, tokens, seed, tokenizer or tokenizer_of(path))
    tokenizer, config = tokenizer or tokenizer_of(path), read_config(path)
    length = _length(config.max_position_embeddings, tokens)
    if tokenizer is None:
        raise SmolseekError(f"{path} has no tokenizer to read text with: put its tokenizer.json there")
    documents = [t for t in read_documents([calibration], text_column) if is_validation(t, _HELD_OUT) == held_out]
    try:
        rows = build_sequences(documents, encoder(tokenizer), tokenizer.eos_token_id or 0, length, tokens)
    except TooFewTokens:
        part = "the tenth of its documents that is held out does" if held_out else "its documents but a tenth do"
        raise SmolseekError(
            f"calibration {calibration} is too short: {part} not fill one window of {length:,} tokens: "
            "give more documents, or use builtin"
        ) from None
    require_known(int(rows.max()), tokenizer, config.vocab_size)
    return rows


def _written(path: Path, tokens: int, seed: int, tokenizer: Any) -> torch.Tensor:
    """Return windows that the model at `path` writes itself, each from the token on that begins a text: BOS where the
    tokenizer writes one, else an end token.
    """
    model = load_causal_lm(path)
    length = _length(model.config.max_position_embeddings, tokens)
    start = (begin_ids(tokenizer) if tokenizer else []) or [*model.config.eos_ids, 0][:1]
    prompts = [start] * max(tokens // length, 1)
    console.say(f"The source writes {len(prompts) * length:,} tokens to calibrate with")
    # A seed a row, or all rows would say the same.
    sampling = [SamplingParams(temperature=1.0, seed=seed * 100_003 + row) for row in range(len(prompts))]
    rows: list[list[int]] = []
    with console.progress(len(prompts), "writing") as bar:
        for lot in range(0, len(prompts), _LOT):
            writer = Generator(model, prompts[lot : lot + _LOT], sampling[lot : lot + _LOT], length + 1 - len(start))
            rows += [[*start, *result.tokens] for result in writer.finish()]
            bar.update(len(rows))
    return torch.tensor(rows)


def _length(context: int, tokens: int) -> int:
    return min(_WINDOW, context - 1, tokens)
