"""Splits the keys of a Llama layer into components, each with a rotary frequency and an importance.

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, J = d/2 frequencies, K = GJ complex key
features in the order (g, j), C components of the key, N real features without RoPE, S slots with RoPE (a slot is one
complex feature), T distances.

RoPE is written with complex numbers: a pair of features is one complex feature, which RoPE multiplies by e^(i s w) at
position s, where w is the frequency of the pair. docs/conversion.md derives the method.
"""

from dataclasses import dataclass

import torch

from smolseek.config import ModelConfig
from smolseek.convert.calibrate import Statistics
from smolseek.convert.conversion import Method
from smolseek.model.attention import GQA
from smolseek.model.rope import frequencies
from smolseek.storage.rope_layout import interleaved


@dataclass(frozen=True)
class Layer:
    """Projections and statistics of one layer in float64, with quantities that are derived from these."""

    method: Method
    w_J: torch.Tensor
    """RoPE frequencies of the source."""
    q_HdD: torch.Tensor
    k_KD: torch.Tensor  # complex
    v_GdD: torch.Tensor
    moment_DD: torch.Tensor
    """Second moment of the attention's input."""
    seen_HT: torch.Tensor
    """Distribution of each head's attention over the distances."""
    value_Gdd: torch.Tensor
    """Weight of an error in the values of a group: the sum of W_O^T W_O over the heads of the group."""
    importance_H: torch.Tensor
    """Energy of each head's output, which weights the errors in the scores of the head."""
    weighted_HJ: torch.Tensor
    """Energy of each head's queries at each frequency, times the importance of the head."""
    basis_KC: torch.Tensor  # k = basis c
    inverse_CK: torch.Tensor  # c = inverse k
    share_CK: torch.Tensor
    """Energy that each component contributes to each key feature, divided by the weight of the queries."""
    loss_C: torch.Tensor
    """Error that arises if a component loses its RoPE."""
    frequency_C: torch.Tensor
    """Index in `w_J` of each component's frequency."""

    def total(self) -> float:
        """Return the energy of all heads' outputs; the layer's errors are measured relative to this energy."""
        return float(self.importance_H.sum())

    def losses(self, w_S: torch.Tensor) -> torch.Tensor:
        """Return the error [C, S] that arises if RoPE rotates a component at frequency w_s instead of its own."""
        left_HJS = self.weighted_HJ[:, :, None] * (1 - mean_rotation(self.seen_HT, self.w_J, w_S).abs().square())
        return self.share_CK @ left_HJS.unflatten(0, (len(self.v_GdD), -1)).sum(dim=1).flatten(0, 1)


def mean_rotation(seen_HT: torch.Tensor, w_J: torch.Tensor, w_S: torch.Tensor) -> torch.Tensor:
    """Return the mean of e^(i t (w_s - w_j)), complex [H, J, S], over the distances t that each head attends to.

    The mean is the factor with which a key rotated at w_s best approximates the key rotated at w_j. A frequency w_s of
    0 means that the key is not rotated.
    """
    distance_T1 = torch.arange(seen_HT.shape[1]).double()[:, None]
    turns_TJ, back_TS = torch.exp(-1j * distance_T1 * w_J), torch.exp(1j * distance_T1 * w_S)
    return (seen_HT[:, :, None] * turns_TJ).mT @ back_TS


def analyse(config: ModelConfig, attention: GQA, stats: Statistics, method: Method, freq_fold: int) -> Layer:
    """Return one attention layer of the Llama `config` with the components of its keys.

    The components are the principal axes of the key features that all groups have at a frequency, or at `freq_fold`
    adjacent frequencies.
    """
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
    J, ours = d // 2, method == "smolseek"
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    q, k, v, o = (projection.weight.detach().double() for projection in projections)
    w_J = frequencies(config.rope_parameters, d).double()
    q_HdD = interleaved(q, H).unflatten(0, (H, d))
    k_KD = torch.view_as_complex(interleaved(k, G).unflatten(0, (-1, 2)).mT.contiguous())
    v_GdD = v.unflatten(0, (G, d))
    o_Hdd = torch.stack([w_Dd.T @ w_Dd for w_Dd in o.split(d, dim=1)])
    value_Gdd = o_Hdd.unflatten(0, (G, -1)).sum(dim=1)
    moment_DD = stats.attended_DD if ours else stats.moment_DD
    vv_Gdd = v_GdD @ moment_DD @ v_GdD.mT
    importance_H = (o_Hdd * vv_Gdd.repeat_interleave(H // G, dim=0)).sum(dim=(1, 2))
    seen_HT = stats.distance_HT / stats.distance_HT.sum(dim=1, keepdim=True).clamp(min=1e-12)

    energy_HJ = ((q_HdD @ moment_DD) * q_HdD).sum(dim=-1).unflatten(1, (J, 2)).sum(dim=-1)
    weighted_HJ = importance_H[:, None] * energy_HJ
    a_GJ = weighted_HJ.unflatten(0, (G, -1)).sum(dim=1) if ours else torch.ones(G, J).double()
    a_GJ = a_GJ.clamp(min=1e-9 * float(a_GJ.max()))
    root_K = a_GJ.flatten().sqrt()
    left_HJ = weighted_HJ * (1 - mean_rotation(seen_HT, w_J, torch.zeros(1))[:, :, 0].abs().square())
    lost_K = left_HJ.unflatten(0, (G, -1)).sum(dim=1).flatten() / root_K.square()
    scaled_KD = root_K[:, None] * k_KD
    cov_KK = scaled_KD @ moment_DD.to(scaled_KD) @ scaled_KD.mH
    if not ours:
        cov_KK = cov_KK.real.to(scaled_KD)  # TransMLA has one rotation for real and imaginary parts
    unitary_KC = torch.zeros_like(cov_KK)
    share_CK, losses, frequency = torch.zeros(cov_KK.shape).double(), [], []
    for start in range(0, J, freq_fold):
        features = (torch.arange(G)[:, None] * J + torch.arange(start, start + freq_fold)).flatten()
        energy, axes = torch.linalg.eigh(cov_KK[features][:, features])
        cost = energy.clamp(min=0) * ((axes.abs().square() * lost_K[features, None]).sum(dim=0) if ours else 1)
        order = cost.argsort(descending=True)
        numbers = torch.arange(len(features)) + start * G
        unitary_KC[features[:, None], numbers] = axes[:, order]
        share_CK[numbers[:, None], features] = (energy.clamp(min=0) * axes.abs().square()).T[order]
        losses.append(cost[order])
        frequency += [start] * len(features)
    source = method, w_J, q_HdD, k_KD, v_GdD, moment_DD, seen_HT, value_Gdd, importance_H, weighted_HJ
    basis = unitary_KC / root_K[:, None], unitary_KC.mH * root_K, share_CK / root_K.square()
    return Layer(*source, *basis, torch.cat(losses), torch.tensor(frequency))


def _real(z: torch.Tensor) -> torch.Tensor:
    """Return the complex matrix [..., A, B] as a real matrix [..., 2A, 2B] that acts on pairs (re, im)."""
    real = torch.stack((torch.stack((z.real, -z.imag), dim=-1), torch.stack((z.imag, z.real), dim=-1)), dim=-3)
    return real.flatten(-4, -3).flatten(-2)


def queries(layer: Layer, components_S: torch.Tensor, w_S: torch.Tensor) -> torch.Tensor:
    """Return the real matrices [H, 2S, d] that map a head's query to a query for `components_S`, rotated at `w_S`."""
    H, G, J = len(layer.q_HdD), len(layer.v_GdD), len(layer.w_J)
    basis_HJS = layer.basis_KC.unflatten(0, (G, J))[:, :, components_S].repeat_interleave(H // G, dim=0)
    if layer.method == "smolseek":
        basis_HJS = basis_HJS * mean_rotation(layer.seen_HT, layer.w_J, w_S)
    return _real(basis_HJS.conj().mT.contiguous())


def keys(layer: Layer, components_S: torch.Tensor) -> torch.Tensor:
    """Return the real rows [2S, D] of the key projection for `components_S`."""
    return _real((layer.inverse_CK @ layer.k_KD)[components_S])[:, ::2]


def latent(layer: Layer, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Analyse what the latent must hold: the components `others`, which lose RoPE, and all values.

    Returns:
        Four tensors, with F = N + Gd: the matrices [H, N, d] that map a head's query to a query for `others`, the
        weighted projection [F, D] of the input to `others` and the values, the matrix [F, F] that removes the weights,
        and the principal axes [F, F] of the weighted features, the largest first.
    """
    queries_HNd = queries(layer, others, torch.zeros(1))
    keys_ND, values = keys(layer, others), layer.v_GdD.flatten(0, 1)
    if layer.method == "smolseek":
        read_NN = (queries_HNd @ query_weights(layer) @ queries_HNd.mT).sum(dim=0)
        weights = [read_NN, torch.block_diag(*layer.value_Gdd)]
    else:
        norm = [(f @ layer.moment_DD * f).sum().clamp(min=1e-12) for f in (keys_ND, values)]
        weights = [torch.eye(len(keys_ND)).double() * norm[1] / norm[0], torch.eye(len(values)).double()]
    weight, axes = torch.linalg.eigh(torch.block_diag(*weights))
    root = weight.clamp(min=1e-10 * float(weight.max())).sqrt()
    scaled = root[:, None] * (axes.T @ torch.cat((keys_ND, values)))
    vectors = torch.linalg.eigh(scaled @ layer.moment_DD @ scaled.T)[1]
    return queries_HNd, scaled, axes / root, vectors.flip(1)


def query_weights(layer: Layer) -> torch.Tensor:
    """Return the weight [H, d, d] of an error in a head's keys: the queries' second moment times the importance."""
    return layer.q_HdD @ layer.moment_DD @ layer.q_HdD.mT * (layer.importance_H / layer.q_HdD.shape[1])[:, None, None]
