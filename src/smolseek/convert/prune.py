"""Fewer neurons: the least useful are left out, and the output matrix of the others makes up for them.

Shapes: T tokens of a sequence, D hidden_size, I neurons of a layer, K of them kept.
"""

from functools import partial
from typing import Any

import torch

from smolseek import console
from smolseek.convert.calibrate import observe
from smolseek.convert.experts import FeedForward, heaviest
from smolseek.convert.least_squares import ridge_solve
from smolseek.model.transformer import CausalLM

RIDGE = 0.1
"""Weight of staying near the first output matrix, as a share of the neurons' mean energy.

Chosen on text of other kinds than the calibration: with 1e-3 the fit is nearer to the calibration, but there further.
"""


@torch.no_grad()
def prune(model: CausalLM, sequences: torch.Tensor, kept: int) -> list[tuple[FeedForward, float]]:
    """Keep `kept` neurons of every feed-forward layer of the Llama `model`, chosen and fitted on `sequences` [N, T+1].

    A neuron writes h_i d_i, its activation and its column of the output matrix. Those with the largest mean energy
    E[h_i^2] |d_i|^2 stay. The new output matrix W minimises E|D h - W h_K|^2 + ridge |W - D_K|^2. With each layer comes
    the relative squared error of its output.
    """
    layers: Any = model.model.layers
    mlps = [layer.mlp for layer in layers]
    grams = [torch.zeros(mlp.down_proj.in_features, mlp.down_proj.in_features) for mlp in mlps]

    def add(gram_II: torch.Tensor, h_BTI: torch.Tensor) -> None:
        h_TI = h_BTI.flatten(0, -2)
        gram_II += h_TI.T @ h_TI

    watched = [(mlp.down_proj, partial(add, gram_II)) for mlp, gram_II in zip(mlps, grams, strict=True)]
    observe(model, sequences, "watching neurons", watched)
    out = []
    with console.progress(len(mlps), "pruning") as bar:
        for done, (mlp, gram_II) in enumerate(zip(mlps, grams, strict=True), 1):
            out.append(fit(FeedForward.of(mlp), gram_II, kept))
            bar.update(done)
    return out


def fit(layer: FeedForward, gram_II: torch.Tensor, kept: int) -> tuple[FeedForward, float]:
    """Return the layer's `kept` most useful neurons, and the relative squared error of their output.

    `gram_II` is the sum of h h^T over the tokens.
    """
    down_DI, gram_II = layer.down_DI.double(), gram_II.double()
    importance_I = gram_II.diagonal() * down_DI.square().sum(dim=0)
    chosen_K, _ = heaviest(importance_I, kept)
    cross_DK, first_DK = down_DI @ gram_II[:, chosen_K], down_DI[:, chosen_K]
    new_DK = ridge_solve(gram_II[chosen_K][:, chosen_K], cross_DK, first_DK, RIDGE)
    change_DI = down_DI.clone()
    change_DI[:, chosen_K] -= new_DK.double()
    before = float(((down_DI @ gram_II) * down_DI).sum())
    error = float(((change_DI @ gram_II) * change_DI).sum()) / max(before, 1e-30)
    return layer.neurons(chosen_K)._replace(down_DI=new_DK), error
