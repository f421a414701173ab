"""What a Llama's attention is made of, for a smaller cache: key components, each with a frequency and an importance.

Shapes: D hidden_size, H query heads, G key/value heads, d features of a head, J = d/2 frequencies, K = GJ complex key
features in the order (g, j), C components of the key, N real features without position, S slots with position, T
distances.

Everything about positions is complex: k_gj turns by e^(i t w_j), and head h of group g scores
Re sum_j conj(q_hj) k_gj e^(i w_j (s-t)). Derived in docs/conversion.md.
"""

from dataclasses import dataclass, field

import torch

from smolseek.config import ModelConfig
from smolseek.convert import lossless
from smolseek.convert.calibrate import Statistics
from smolseek.convert.conversion import Method
from smolseek.model.attention import GQA
from smolseek.model.rope import frequencies


@dataclass
class Layer:
    """One layer's projections and statistics, and what is derived from them, in float64."""

    method: Method
    w_J: torch.Tensor
    """Frequencies of the source."""
    q_HdD: torch.Tensor
    k_KD: torch.Tensor  # complex
    v_GdD: torch.Tensor
    moment_DD: torch.Tensor
    seen_HT: torch.Tensor
    """Share of each head's attention by distance."""
    value_Gdd: torch.Tensor
    importance_H: torch.Tensor
    """Energy that a head writes: what a unit of error in its scores costs."""
    basis_KC: torch.Tensor = field(init=False)  # k = basis c
    inverse_CK: torch.Tensor = field(init=False)  # c = inverse k
    weighted_HJ: torch.Tensor = field(init=False)
    """Energy of a head's queries times its importance."""
    share_CK: torch.Tensor = field(init=False)
    """Energy of a component that a key carries, by unit of what reads it."""
    loss_C: torch.Tensor = field(init=False)
    """What is lost when a component loses its position."""
    frequency_C: torch.Tensor = field(init=False)

    def total(self) -> float:
        """Return the energy that all heads write: the measure of the layer's errors."""
        return float(self.importance_H.sum())

    def phase(self, w_S: torch.Tensor) -> torch.Tensor:
        """Return the mean rotation [H, J, S], complex, that attention sees a key of frequency w_j make beside w_s.

        A key that is turned by w_s instead of w_j is nearest to itself when multiplied by it; w_s = 0 is no rotation.
        """
        distance_T1 = torch.arange(self.seen_HT.shape[1]).double()[:, None]
        turns_TJ, back_TS = torch.exp(-1j * distance_T1 * self.w_J), torch.exp(1j * distance_T1 * w_S)
        return (self.seen_HT[:, :, None] * turns_TJ).mT @ back_TS

    def losses(self, w_S: torch.Tensor) -> torch.Tensor:
        """Return what is lost [C, S] when a component is turned by w_s instead of its own frequency."""
        left_HJS = self.weighted_HJ[:, :, None] * (1 - self.phase(w_S).abs().square())
        return self.share_CK @ left_HJS.unflatten(0, (len(self.v_GdD), -1)).sum(dim=1).flatten(0, 1)


def analyse(config: ModelConfig, attention: GQA, stats: Statistics, method: Method, freq_fold: int) -> Layer:
    """Return the layer with the attention of the Llama `config`, its key components found."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    q, k, v, o = (projection.weight.detach().double() for projection in projections)
    w_J = frequencies(config.rope_parameters, d).double()
    q_HdD = lossless.interleave(q, H).unflatten(0, (H, d))
    k_KD = torch.view_as_complex(lossless.interleave(k, G).unflatten(0, (-1, 2)).mT.contiguous())
    v_GdD = v.unflatten(0, (G, d))
    o_Hdd = torch.stack([part.T @ part for part in o.split(d, dim=1)])
    value_Gdd = o_Hdd.unflatten(0, (G, -1)).sum(dim=1)
    moment = stats.attended_DD if method == "smolseek" else stats.moment_DD
    vv_Gdd = v_GdD @ moment @ v_GdD.mT
    importance_H = (o_Hdd * vv_Gdd.repeat_interleave(H // G, dim=0)).sum(dim=(1, 2))
    seen_HT = stats.distance_HT / stats.distance_HT.sum(dim=1, keepdim=True).clamp(min=1e-12)
    out = Layer(method, w_J, q_HdD, k_KD, v_GdD, moment, seen_HT, value_Gdd, importance_H)
    _find_components(out, freq_fold)
    return out


def _find_components(layer: Layer, freq_fold: int) -> None:
    """Find the components: principal axes over the groups, within a frequency or `freq_fold` adjacent ones."""
    G, J, ours = len(layer.v_GdD), len(layer.w_J), layer.method == "smolseek"
    energy_HJ = ((layer.q_HdD @ layer.moment_DD) * layer.q_HdD).sum(dim=-1).unflatten(1, (J, 2)).sum(dim=-1)
    layer.weighted_HJ = layer.importance_H[:, None] * energy_HJ
    a_GJ = layer.weighted_HJ.unflatten(0, (G, -1)).sum(dim=1) if ours else torch.ones(G, J).double()
    a_GJ = a_GJ.clamp(min=1e-9 * float(a_GJ.max()))
    root_K = a_GJ.flatten().sqrt()
    left_HJ = layer.weighted_HJ * (1 - layer.phase(torch.zeros(1))[:, :, 0].abs().square())
    lost_K = left_HJ.unflatten(0, (G, -1)).sum(dim=1).flatten() / root_K.square()
    scaled_KD = root_K[:, None] * layer.k_KD
    cov_KK = scaled_KD @ layer.moment_DD.to(scaled_KD) @ scaled_KD.mH
    if not ours:
        cov_KK = cov_KK.real.to(scaled_KD)  # published: one real rotation for both halves
    unitary = torch.zeros_like(cov_KK)
    loss, freq, share_CK = [], [], torch.zeros(cov_KK.shape).double()
    for start in range(0, J, freq_fold):
        places = (torch.arange(G)[:, None] * J + torch.arange(start, start + freq_fold)).flatten()
        energy, axes = torch.linalg.eigh(cov_KK[places][:, places])
        cost = energy.clamp(min=0) * ((axes.abs().square() * lost_K[places, None]).sum(dim=0) if ours else 1)
        order = cost.argsort(descending=True)
        numbers = torch.arange(len(places)) + start * G
        unitary[places[:, None], numbers] = axes[:, order]
        share_CK[numbers[:, None], places] = (energy.clamp(min=0) * axes.abs().square()).T[order]
        loss.append(cost[order])
        freq += [start] * len(places)
    layer.basis_KC = unitary / root_K[:, None]
    layer.inverse_CK = unitary.mH * root_K
    layer.share_CK = share_CK / root_K.square()
    layer.loss_C, layer.frequency_C = torch.cat(loss), torch.tensor(freq)


def real(z: torch.Tensor) -> torch.Tensor:
    """Return the complex map [..., A, B] as a real one of pairs [..., 2A, 2B]."""
    rows = torch.stack((torch.stack((z.real, -z.imag), dim=-1), torch.stack((z.imag, z.real), dim=-1)), dim=-3)
    return rows.flatten(-4, -3).flatten(-2)


def queries(layer: Layer, chosen: torch.Tensor, w_S: torch.Tensor) -> torch.Tensor:
    """Return the real maps [H, 2S, d] from a head's query to what meets the components `chosen` [S], turned by w_s."""
    H, G, J = len(layer.q_HdD), len(layer.v_GdD), len(layer.w_J)
    basis_HJS = layer.basis_KC.unflatten(0, (G, J))[:, :, chosen].repeat_interleave(H // G, dim=0)
    if layer.method == "smolseek":
        basis_HJS = basis_HJS * layer.phase(w_S)
    return real(basis_HJS.conj().mT.contiguous())


def keys(layer: Layer, chosen: torch.Tensor) -> torch.Tensor:
    """Return the real rows [2S, D] of the components `chosen` [S]."""
    return real((layer.inverse_CK @ layer.k_KD)[chosen])[:, ::2]


def latent(layer: Layer, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the components `rest` and all values are read with and from, the best directions first.

    Returns:
        Queries [H, N, d]; features [F, D] of keys and values, F = N + Gd, weighted; the way back from them [F, F] to
        plain ones; and the principal axes [F, F] of the weighted ones.
    """
    queries_HNd = queries(layer, rest, torch.zeros(1))
    keys_ND, values = keys(layer, rest), layer.v_GdD.flatten(0, 1)
    if layer.method == "smolseek":
        parts = [(queries_HNd @ query_weights(layer) @ queries_HNd.mT).sum(dim=0), torch.block_diag(*layer.value_Gdd)]
    else:
        norm = [(f @ layer.moment_DD * f).sum().clamp(min=1e-12) for f in (keys_ND, values)]
        parts = [torch.eye(len(keys_ND)).double() * norm[1] / norm[0], torch.eye(len(values)).double()]
    weight, axes = torch.linalg.eigh(torch.block_diag(*parts))
    root = weight.clamp(min=1e-10 * float(weight.max())).sqrt()
    scaled = root[:, None] * (axes.T @ torch.cat((keys_ND, values)))
    vectors = torch.linalg.eigh(scaled @ layer.moment_DD @ scaled.T)[1]
    return queries_HNd, scaled, axes / root, vectors.flip(1)


def query_weights(layer: Layer) -> torch.Tensor:
    """Return the weight [H, d, d] of an error in each head's keys: its queries' second moment times its importance."""
    return layer.q_HdD @ layer.moment_DD @ layer.q_HdD.mT * (layer.importance_H / layer.q_HdD.shape[1])[:, None, None]
