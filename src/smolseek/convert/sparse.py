"""A dense feed-forward layer as shared experts and a few routed ones of many: fewer neurons for each token.

Shapes: T tokens, D hidden_size, I neurons of the dense layer, E routed experts of F neurons, R = E F routed neurons.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.convert.calibrate import observe
from smolseek.convert.experts import clusters, layer_tensors, split_config
from smolseek.convert.prune import fit, solve
from smolseek.errors import SmolseekError
from smolseek.model.moe import Router
from smolseek.model.transformer import CausalLM

_GATE_RIDGE = 1e-2
"""Weight of small coefficients in the regressions on the layer's input, as a share of its mean energy."""
_FLOOR = 1e-3
"""What is added to an expert's energy before its logarithm, as a share of the mean energy."""
_LOGIT = 0.1
"""Standard deviation of the gate's logits: the sigmoid is straight there, and the chosen weigh nearly the same."""


def sparse_config(config: ModelConfig, experts: int, shared: int, active: int) -> ModelConfig:
    """Return `config` with every dense layer split into `shared` and `experts` experts, `active` of these for a token.

    Raises:
        SmolseekError: if the neurons do not fall into so many experts, or `active` is not a part of them.
    """
    split = split_config(config, experts, shared)
    if not 1 <= active < experts:
        raise SmolseekError(
            f"--active {active} is not between 1 and {experts - 1}, a part of the {experts} routed experts: change "
            "--active or --experts (all of them are --mode exact)"
        )
    return dataclasses.replace(split, num_experts_per_tok=active, routed_scaling_factor=float(active))


def active_neurons(shape: ModelConfig) -> int:
    """Return how many neurons of a layer of `sparse_config` a token uses."""
    return (shape.n_shared_experts + shape.num_experts_per_tok) * shape.moe_intermediate_size


@dataclasses.dataclass(frozen=True)
class Fitted:
    """New feed-forward tensors of every layer, named without the prefix `model.layers.N.mlp.`."""

    layers: list[dict[str, torch.Tensor]]
    errors: list[float]
    """Relative squared error of each layer's output on the calibration text."""


@torch.no_grad()
def sparse(model: CausalLM, shape: ModelConfig, rows: torch.Tensor, seed: int) -> tuple[Fitted, Fitted]:
    """Fit every layer of the Llama `model` to the windows `rows` [N, T+1].

    Returns:
        The experts of `shape` (`sparse_config`), and the control: as many neurons, the same ones for every token.
    """
    blocks: Any = model.model.layers
    inputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, given, n=n: inputs[n].append(given[0].flatten(0, -2)))
        for n, block in enumerate(blocks)
    ]
    observe(model, rows, hooks, "watching neurons")
    active = active_neurons(shape)
    ours, control = Fitted([], []), Fitted([], [])
    with console.progress(len(blocks), "fitting experts") as bar:
        for n, block in enumerate(blocks):
            x_TD = torch.cat(inputs[n])
            inputs[n] = []
            gate, up, down = (p.weight for p in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj))
            h_TI = F.silu(x_TD @ gate.T) * (x_TD @ up.T)
            tensors, error = layer(shape, gate, up, down, x_TD, h_TI, seed)
            ours.layers.append(tensors)
            ours.errors.append(error)
            kept_K, down_DK, error = fit(down, h_TI.T @ h_TI, active)
            control.layers.append(
                {"gate_proj.weight": gate[kept_K], "up_proj.weight": up[kept_K], "down_proj.weight": down_DK}
            )
            control.errors.append(error)
            bar.update(n + 1)
    return ours, control


def layer(
    shape: ModelConfig,
    gate_ID: torch.Tensor,
    up_ID: torch.Tensor,
    down_DI: torch.Tensor,
    x_TD: torch.Tensor,
    h_TI: torch.Tensor,
    seed: int,
) -> tuple[dict[str, torch.Tensor], float]:
    """Return one layer's experts and the relative squared error of their output on the tokens.

    A neuron writes h_i d_i, of norm |h_i| |d_i|. Those with the largest mean square are shared. The others are
    clustered by what a linear map of the layer's input, all that a router sees, can tell of that norm. An expert's
    logit is the regression of the logarithm of what it writes, and then all output matrices are fitted together, by
    least squares, to the dense layer's output under this very routing.

    Args:
        shape: of `sparse_config`.
        gate_ID: the dense layer's first matrix.
        up_ID: its second.
        down_DI: its output matrix.
        x_TD: the layer's inputs.
        h_TI: the neurons' activations on them.
        seed: of the clustering.
    """
    E, size, held = shape.n_routed_experts, shape.moe_intermediate_size, shape.n_shared_experts
    share_I = h_TI.square().mean(dim=0) * down_DI.square().sum(dim=0)
    by_share = share_I.argsort(descending=True, stable=True)
    shared, rest_R = by_share[: held * size].sort().values, by_share[held * size :].sort().values
    norm_TR = h_TI[:, rest_R].abs() * down_DI[:, rest_R].norm(dim=0)
    map_DR, _, root_DD = _regression(x_TD, norm_TR)
    owner_R = clusters((root_DD.T @ map_DR).T.float(), E, seed)
    order_I = torch.cat((shared, rest_R[owner_R.argsort(stable=True)]))
    members = [part.tolist() for part in order_I[held * size :].split(size)]
    router = _router(shape, x_TD, [(h_TI[:, part] @ down_DI[:, part].T).square().sum(dim=1) for part in members])
    routing = router(x_TD)
    weight_TE = torch.zeros(len(x_TD), E).scatter_(1, routing.experts_NK, routing.weights_NK)
    z_TI = h_TI[:, order_I]
    z_TI[:, held * size :] *= weight_TE.repeat_interleave(size, dim=1)
    y_TD = h_TI @ down_DI.T
    new_DI = solve(z_TI.T @ z_TI, (z_TI.T @ y_TD).T, down_DI[:, order_I])
    error = float((y_TD - z_TI @ new_DI.T).square().sum() / y_TD.square().sum().clamp(min=1e-30))
    in_place_DI = torch.empty_like(new_DI)
    in_place_DI[:, order_I] = new_DI
    out = layer_tensors(gate_ID, up_ID, in_place_DI, order_I, held * size, size)
    bias_E = router.e_score_correction_bias
    return out | {"gate.weight": router.weight.detach(), "gate.e_score_correction_bias": bias_E}, error


def _router(shape: ModelConfig, x_TD: torch.Tensor, energies: Sequence[torch.Tensor]) -> Router:
    """Return DeepSeek's gate that prefers the experts with the largest `energies` [T] of what they write.

    The regression of log energy is a x + b. DeepSeek's gate has no intercept, but its balancing bias is one: near 0
    sigmoid(s a x) is 1/2 + s a x / 4, so with s b / 4 added the order is that of a x + b. With s small the weights,
    normalised and multiplied by the number of the chosen, are all near 1.
    """
    energy_TE = torch.stack(tuple(energies), dim=1)
    map_DE, offset_E, _ = _regression(x_TD, (energy_TE + _FLOOR * energy_TE.mean().clamp(min=1e-30)).log())
    scale = _LOGIT / float((x_TD.double() @ map_DE).square().mean().sqrt().clamp(min=1e-30))
    router = Router(shape)
    router.weight.copy_((scale * map_DE.T).float())
    router.e_score_correction_bias.copy_((scale / 4 * (offset_E - offset_E.mean())).float())
    return router


def _regression(x_TD: torch.Tensor, target_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ridge regression of the targets: map [D, X], offset [X], and a root of the inputs' covariance."""
    mean_D, mean_X = x_TD.mean(dim=0), target_TX.mean(dim=0)
    x_TD = x_TD - mean_D
    moment_DD = (x_TD.T @ x_TD).double()
    ridge = _GATE_RIDGE * float(moment_DD.diagonal().mean())
    root_DD = torch.linalg.cholesky(moment_DD + ridge * torch.eye(len(moment_DD)).double())
    map_DX = torch.cholesky_solve((x_TD.T @ (target_TX - mean_X)).double(), root_DD)
    return map_DX, mean_X.double() - mean_D.double() @ map_DX, root_DD
