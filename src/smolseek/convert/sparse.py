"""Fits feed-forward layers with fewer active neurons: pruned layers, or experts of which each token uses only some.

Shapes: T tokens, D hidden_size, I neurons of the dense layer, K neurons that are kept, E routed experts of F neurons,
R = E F routed neurons.
"""

from functools import partial
from typing import Any

import torch

from smolseek import console
from smolseek.config import ModelConfig
from smolseek.convert.calibrate import observe
from smolseek.convert.experts import FeedForward, clusters, heaviest, partition
from smolseek.convert.least_squares import ridge_solve
from smolseek.model.moe import Router
from smolseek.model.transformer import CausalLM
from smolseek.ops.linear import linear_swiglu

_RIDGE = 0.1
"""Ridge penalty on changes of the output matrix, as a share of the neurons' mean energy.

The value was chosen on text unlike the calibration text. A value of 1e-3 is better on the calibration text, but worse
on other text.
"""
_GATE_RIDGE = 1e-2
"""Ridge penalty in the regressions on the layer's input, as a share of the input's mean energy."""
_SMALL_ENERGY = 1e-3
"""Share of the mean energy that is added to an expert's energy before the logarithm is taken."""
_LOGIT_STD = 0.1
"""Standard deviation of the router's logits: small, so that sigmoid is nearly linear and the weights nearly equal."""


def active_neurons(config: ModelConfig) -> int:
    """Return how many neurons of an MoE layer a token uses."""
    return (config.n_shared_experts + config.num_experts_per_tok) * config.moe_intermediate_size


@torch.no_grad()
def prune(model: CausalLM, sequences: torch.Tensor, neurons: int) -> list[tuple[FeedForward, float]]:
    """Prune every feed-forward layer of the Llama `model` to `neurons` neurons, chosen on `sequences` [N, T+1].

    A neuron adds its activation times its column of the output matrix to the output of the layer. The neurons whose
    contributions have the largest mean energy are kept. The new output matrix is a least-squares fit of the kept
    neurons to the output of the full layer, with a ridge penalty on changes of the columns.

    Returns:
        The pruned layers, each with the relative squared error of its output.
    """
    layers: Any = model.model.layers
    mlps = [layer.mlp for layer in layers]
    grams = [torch.zeros(mlp.down_proj.in_features, mlp.down_proj.in_features) for mlp in mlps]

    def add(gram_II: torch.Tensor, h_BTI: torch.Tensor) -> None:
        h_TI = h_BTI.flatten(0, -2)
        gram_II += h_TI.T @ h_TI

    observed = [(mlp.down_proj, partial(add, gram_II)) for mlp, gram_II in zip(mlps, grams, strict=True)]
    observe(model, sequences, "watching neurons", observed)
    out = []
    with console.progress(len(mlps), "pruning") as bar:
        for mlp, gram_II in zip(mlps, grams, strict=True):
            out.append(prune_layer(FeedForward.of(mlp), gram_II, neurons))
            bar.update(len(out))
    return out


def prune_layer(layer: FeedForward, gram_II: torch.Tensor, neurons: int) -> tuple[FeedForward, float]:
    """Return the layer with its `neurons` most useful neurons, and the relative squared error of the layer's output.

    `gram_II` is the sum of h h^T over the tokens, where h are the activations of the neurons.
    """
    down_DI, gram_II = layer.down_DI.double(), gram_II.double()
    chosen_K, _ = heaviest(gram_II.diagonal() * down_DI.square().sum(dim=0), neurons)
    cross_DK, first_DK = down_DI @ gram_II[:, chosen_K], down_DI[:, chosen_K]
    new_DK = ridge_solve(gram_II[chosen_K][:, chosen_K], cross_DK, first_DK, _RIDGE)
    change_DI = down_DI.clone()
    change_DI[:, chosen_K] -= new_DK.double()
    before = float(((down_DI @ gram_II) * down_DI).sum())
    error = float(((change_DI @ gram_II) * change_DI).sum()) / max(before, 1e-30)
    return layer.neurons(chosen_K)._replace(down_DI=new_DK), error


@torch.no_grad()
def sparse(
    model: CausalLM, config: ModelConfig, sequences: torch.Tensor, seed: int
) -> tuple[list[tuple[dict[str, torch.Tensor], float]], list[tuple[FeedForward, float]]]:
    """Convert every feed-forward layer of the Llama `model` to experts that are fitted on `sequences` [N, T+1].

    Returns:
        The layers with the experts of `config`, and control layers that are pruned to as many active neurons. Each
        layer comes with the relative squared error of its output.
    """
    layers: Any = model.model.layers
    mlps = [layer.mlp for layer in layers]
    inputs: list[list[torch.Tensor]] = [[] for _ in mlps]

    def keep(into: list[torch.Tensor], x_BTD: torch.Tensor) -> None:
        into.append(x_BTD.flatten(0, -2))

    observed = [(mlp, partial(keep, into)) for mlp, into in zip(mlps, inputs, strict=True)]
    observe(model, sequences, "watching neurons", observed)
    experts, control = [], []
    with console.progress(len(mlps), "fitting experts") as bar:
        for mlp in mlps:
            dense, x_TD = FeedForward.of(mlp), torch.cat(inputs.pop(0))
            h_TI = linear_swiglu(x_TD, dense.gate_ID, dense.up_ID)
            experts.append(sparse_layer(config, dense, x_TD, h_TI, seed))
            control.append(prune_layer(dense, h_TI.T @ h_TI, active_neurons(config)))
            bar.update(len(experts))
    return experts, control


def sparse_layer(
    config: ModelConfig, dense: FeedForward, x_TD: torch.Tensor, h_TI: torch.Tensor, seed: int
) -> tuple[dict[str, torch.Tensor], float]:
    """Return one layer's experts and the relative squared error of their output on the tokens.

    A neuron adds its activation times its column of the output matrix to the output of the layer. The neurons whose
    contributions have the largest mean squared norm go into the shared experts. For every other neuron, a linear
    regression predicts the norm of the contribution from the layer's input, because a router is linear, too. The
    neurons are clustered by their regression coefficients. The router's logit for an expert is a linear regression of
    the logarithm of the energy of the expert's output. At last, a least-squares fit computes all output matrices
    together, so that the routed experts reproduce the dense layer's output. `config` comes from `with_experts`, and
    `h_TI` are the neurons' activations on the inputs `x_TD`.
    """
    E, size, shared = config.n_routed_experts, config.moe_intermediate_size, config.n_shared_experts
    down_DI = dense.down_DI
    shared_X, routed_R = heaviest(h_TI.square().mean(dim=0) * down_DI.square().sum(dim=0), shared * size)
    norm_TR = h_TI[:, routed_R].abs() * down_DI[:, routed_R].norm(dim=0)
    map_DR, _, root_DD = _regression(x_TD, norm_TR)
    order_I = torch.cat((shared_X, routed_R[clusters((root_DD.T @ map_DR).T.float(), E, seed)]))
    members = [part.tolist() for part in order_I[shared * size :].split(size)]
    energy_TE = torch.stack([(h_TI[:, part] @ down_DI[:, part].T).square().sum(dim=1) for part in members], dim=1)
    router = _router(config, x_TD, energy_TE)
    routing = router(x_TD)
    weight_TE = torch.zeros(len(x_TD), E).scatter_(1, routing.experts_NK, routing.weights_NK)
    z_TI = h_TI[:, order_I]
    z_TI[:, shared * size :] *= weight_TE.repeat_interleave(size, dim=1)
    y_TD = h_TI @ down_DI.T
    new_DI = ridge_solve(z_TI.T @ z_TI, (z_TI.T @ y_TD).T, down_DI[:, order_I], _RIDGE)
    error = float((y_TD - z_TI @ new_DI.T).square().sum() / y_TD.square().sum().clamp(min=1e-30))
    in_place_DI = torch.empty_like(new_DI)
    in_place_DI[:, order_I] = new_DI
    gate = {f"gate.{name}": tensor for name, tensor in router.state_dict().items()}
    return partition(config, dense._replace(down_DI=in_place_DI), order_I) | gate, error


def _router(config: ModelConfig, x_TD: torch.Tensor, energy_TE: torch.Tensor) -> Router:
    """Return a DeepSeek router that selects the experts whose outputs have the largest predicted energies.

    The energy of an output is its squared norm.

    A linear regression with an intercept predicts the logarithm of an expert's energy from the layer's input.
    DeepSeek's router has no intercept, but its balancing bias can replace the intercept. The regression is scaled down,
    so that the sigmoid of the router is nearly linear and the router orders the experts by the predicted energy. The
    weights of the selected experts, normalised and multiplied by their number, are then all near 1.
    """
    map_DE, offset_E, _ = _regression(x_TD, (energy_TE + _SMALL_ENERGY * energy_TE.mean().clamp(min=1e-30)).log())
    scale = _LOGIT_STD / float((x_TD.double() @ map_DE).square().mean().sqrt().clamp(min=1e-30))
    router = Router(config)
    router.weight.copy_((scale * map_DE.T).float())
    router.e_score_correction_bias.copy_((scale / 4 * (offset_E - offset_E.mean())).float())
    return router


def _regression(x_TD: torch.Tensor, target_TX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the matrix [D, X] and offset [X] of a ridge regression on x, and a root of the covariance of x."""
    mean_D, mean_X = x_TD.mean(dim=0), target_TX.mean(dim=0)
    x_TD = x_TD - mean_D
    moment_DD = (x_TD.T @ x_TD).double()
    ridge = _GATE_RIDGE * float(moment_DD.diagonal().mean())
    root_DD = torch.linalg.cholesky(moment_DD + ridge * torch.eye(len(moment_DD)).double())
    map_DX = torch.cholesky_solve((x_TD.T @ (target_TX - mean_X)).double(), root_DD)
    return map_DX, mean_X.double() - mean_D.double() @ map_DX, root_DD
