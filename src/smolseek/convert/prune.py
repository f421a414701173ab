"""Fewer neurons: the least useful are left out, and the output matrix of the others makes up for them.

Shapes: T tokens of a window, D hidden_size, I neurons of a layer, K of them kept.
"""

from typing import Any

import torch

from smolseek import console
from smolseek.convert.calibrate import observe
from smolseek.model.transformer import CausalLM

_RIDGE = 0.1
"""Weight of staying near the first output matrix, as a share of the neurons' mean energy.

Chosen on text of other kinds than the calibration: with 1e-3 the fit is nearer to the calibration, but there further.
"""


@torch.no_grad()
def prune(model: CausalLM, rows: torch.Tensor, kept: int) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """Keep `kept` neurons of every feed-forward layer of the Llama `model`, chosen and fitted on `rows` [N, T+1].

    A neuron writes h_i d_i, its activation and its column of the output matrix. Those with the largest mean energy
    E[h_i^2] |d_i|^2 stay. The new output matrix W minimises E|D h - W h_K|^2 + ridge |W - D_K|^2.

    Returns:
        Each layer's three matrices, named without the prefix `model.layers.N.mlp.`, and each layer's relative squared
        error of the output on `rows`.
    """
    layers: Any = model.model.layers
    grams = [torch.zeros(block.mlp.down_proj.in_features, block.mlp.down_proj.in_features) for block in layers]

    def watch(n: int, h_TI: torch.Tensor) -> None:
        grams[n] += h_TI.T @ h_TI

    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda _, given, n=n: watch(n, given[0].flatten(0, -2)))
        for n, block in enumerate(layers)
    ]
    observe(model, rows, hooks, "watching neurons")
    out, errors = [], []
    with console.progress(len(grams), "pruning") as bar:
        for done, (block, gram) in enumerate(zip(layers, grams, strict=True), 1):
            chosen_K, down_DK, error = fit(block.mlp.down_proj.weight, gram, kept)
            gate, up = block.mlp.gate_proj.weight[chosen_K], block.mlp.up_proj.weight[chosen_K]
            out.append({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down_DK})
            errors.append(error)
            bar.update(done)
    return out, errors


def fit(down_DI: torch.Tensor, gram_II: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the neurons kept [K], their new output matrix [D, K] in float32, and the relative squared error.

    Args:
        down_DI: the output matrix.
        gram_II: sum of h h^T over the tokens.
        kept: K.
    """
    down_DI, gram_II = down_DI.double(), gram_II.double()
    worth_I = gram_II.diagonal() * down_DI.square().sum(dim=0)
    chosen_K = worth_I.argsort(descending=True, stable=True)[:kept].sort().values
    new_DK = solve(gram_II[chosen_K][:, chosen_K], down_DI @ gram_II[:, chosen_K], down_DI[:, chosen_K]).double()
    change_DI = down_DI.clone()
    change_DI[:, chosen_K] -= new_DK
    before = float(((down_DI @ gram_II) * down_DI).sum())
    error = float(((change_DI @ gram_II) * change_DI).sum()) / max(before, 1e-30)
    return chosen_K, new_DK.float(), error


def solve(square_KK: torch.Tensor, cross_DK: torch.Tensor, first_DK: torch.Tensor) -> torch.Tensor:
    """Return the W [D, K] that minimises |y - W z|^2 + ridge |W - first|^2 over the tokens, in float32.

    Args:
        square_KK: sum of z z^T over the tokens.
        cross_DK: sum of y z^T.
        first_DK: the matrix to stay near.
    """
    square_KK, first_DK = square_KK.double(), first_DK.double()
    ridge = _RIDGE * float(square_KK.diagonal().mean())
    system_KK = square_KK + max(ridge, 1e-30) * torch.eye(len(square_KK)).double()
    return (first_DK + torch.linalg.solve(system_KK, (cross_DK.double() - first_DK @ square_KK).T).T).float()
