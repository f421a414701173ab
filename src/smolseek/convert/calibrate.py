"""What a Llama's attention does on real text: the statistics that a smaller cache is fitted to.

Shapes: T tokens of a window, D hidden_size, H query heads, G key/value heads.
"""

from dataclasses import dataclass

import torch

from smolseek import console
from smolseek.data.sources import read_documents
from smolseek.data.stream import validation_rows
from smolseek.errors import SmolseekError
from smolseek.model.rope import rotate
from smolseek.model.transformer import CausalLM
from smolseek.storage.hf_folder import load_model
from smolseek.tokenizer import encoder, token_bytes


@dataclass
class Statistics:
    """Sums over the calibration text, of one layer."""

    moment_DD: torch.Tensor
    """Second moment of the attention's input."""
    distance_HT: torch.Tensor
    """Attention of each head by distance; the first token, to which idle heads turn, is left out."""


@torch.no_grad()
def statistics(model: CausalLM, rows: torch.Tensor) -> list[Statistics]:
    """Return the statistics of every layer of the Llama `model` on the windows `rows` [N, T+1]."""
    config, T = model.config, rows.shape[1] - 1
    heads, size = config.num_attention_heads, config.qk_head_dim
    distance_TT = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    unseen_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    D = config.hidden_size
    found = [
        Statistics(torch.zeros(D, D).double(), torch.zeros(heads, T).double())
        for _ in range(config.num_hidden_layers)
    ]

    def watch(attention, inputs) -> None:  # type: ignore[no-untyped-def]
        x_TD, (cos, sin) = inputs[0][0], inputs[1]
        into = found[attention.layer]
        into.moment_DD += (x_TD.T @ x_TD).double() / rows[:, :-1].numel()
        q_HTd, k_GTd = (
            rotate(p(x_TD).unflatten(-1, (-1, size)).transpose(0, 1), cos, sin, interleave=False)
            for p in (attention.q_proj, attention.k_proj)
        )
        k_HTd = k_GTd.repeat_interleave(heads // len(k_GTd), dim=0)
        p_HTT = (q_HTd @ k_HTd.mT * size**-0.5).masked_fill(unseen_TT, -torch.inf).softmax(dim=-1)
        p_HTT[:, :, 0] = 0
        into.distance_HT.index_add_(1, distance_TT.flatten(), p_HTT.flatten(1).double())

    hooks = [layer.self_attn.register_forward_pre_hook(watch) for layer in model.model.layers]
    try:
        with console.progress(len(rows), "calibrating") as bar:
            for done, row in enumerate(rows, 1):
                model.hidden(row[None, :-1])
                bar.update(done)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def calibrate(path: str, calibration: str, tokens: int, seq_len: int = 512) -> list[Statistics]:
    """Return the statistics of the model at `path` on `tokens` tokens of `calibration` (`builtin` or a path).

    Raises:
        SmolseekError: if the model has no tokenizer or the text is too short.
    """
    loaded = load_model(path)
    if loaded.tokenizer is None:
        raise SmolseekError(f"{path} has no tokenizer, and --mode compress reads text: put a tokenizer.json into it")
    rows, _ = validation_rows(
        read_documents([calibration], "text"),
        encoder(loaded.tokenizer),
        loaded.tokenizer.eos_token_id or 0,
        min(seq_len, loaded.config.max_position_embeddings - 1, tokens),
        tokens,
        token_bytes(loaded.tokenizer),
    )
    return statistics(loaded.model, rows)
