"""Products and attention over a prompt in bfloat16, through prefill.c; with PyTorch's operations where it does not fit.

Shapes: T tokens, A of them that ask (the last ones), M pairs of token and expert sorted by expert, K experts of a
token, E experts, D inputs, F outputs, H query heads, G groups of key/value heads, N and R features of a head without
and with position, V features of a value head.
"""

import ctypes

import torch

from smolseek.generate.cpu_decode import library
from smolseek.model.transformer import CausalLM

_BLOCK = 64  # keys of a block, as in prefill.c


class _Heads(ctypes.Structure):
    """As in prefill.c: where a tensor's tokens and heads lie."""

    _fields_ = [("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


def _heads(x: torch.Tensor) -> _Heads:
    assert x.stride(-1) == 1
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1) if x.ndim == 3 else 0)


class Pairs:
    """What prefill.c computes, on bfloat16 tensors in main memory."""

    def __init__(self, found: ctypes.CDLL) -> None:
        self._found = found
        self._threads = torch.get_num_threads()

    def products(
        self,
        x_TD: torch.Tensor,
        w_EFD: torch.Tensor,
        up_EFD: torch.Tensor | None = None,
        *,
        ends_E: torch.Tensor | None = None,
        tokens_M: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Multiply each expert's rows with its matrix -> [M, F]; with `up_EFD`, SwiGLU: silu(w x) * (up x).

        `ends_E` says behind which row each expert's end; without it there is one matrix. `tokens_M` says which rows
        of `x_TD` are meant; without it, all of them in order.
        """
        E, F, D = w_EFD.shape
        x_TD = x_TD.contiguous()
        rows = x_TD.shape[0] if tokens_M is None else tokens_M.shape[0]
        ends_E = torch.tensor([rows]) if ends_E is None else ends_E
        assert ends_E.shape[0] == E and x_TD.shape[1] == D and w_EFD.stride()[1:] == (D, 1)
        assert up_EFD is None or up_EFD.stride() == w_EFD.stride()
        y_MF = x_TD.new_empty(rows, F)
        self._found.products(
            x_TD.data_ptr(),
            None if tokens_M is None else tokens_M.data_ptr(),
            ends_E.data_ptr(),
            E,
            w_EFD.data_ptr(),
            None if up_EFD is None else up_EFD.data_ptr(),
            w_EFD.stride(0),
            D,
            F,
            y_MF.data_ptr(),
            self._threads,
        )
        return y_MF

    def combine(
        self, y_MD: torch.Tensor, places_TK: torch.Tensor, weights_TK: torch.Tensor, more_TD: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts, which lie at `places_TK`, plus `more_TD` -> [T, D]."""
        (T, K), D = places_TK.shape, y_MD.shape[1]
        out_TD = y_MD.new_empty(T, D)
        more = None if more_TD is None else more_TD.data_ptr()
        weights_TK = weights_TK.contiguous()
        pointers = (y_MD.data_ptr(), places_TK.data_ptr(), weights_TK.data_ptr(), more)
        self._found.combine_experts(*pointers, T, K, D, out_TD.data_ptr(), self._threads)
        return out_TD

    def attend(
        self,
        q_AHQ: torch.Tensor,
        k_TGN: torch.Tensor,
        shared_TR: torch.Tensor | None,
        v_TGV: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attend causally, `shared_TR` being the last features of the keys of all heads -> [A, H*V]."""
        (A, H, Q), (T, G, N), V = q_AHQ.shape, k_TGN.shape, v_TGV.shape[2]
        q_AHQ = q_AHQ.contiguous()
        out_AX = q_AHQ.new_empty(A, H * V)
        room = torch.empty(G * -(-T // _BLOCK) * _BLOCK // 2 * (Q + V), dtype=torch.int32)
        key, value = _heads(k_TGN), _heads(v_TGV)
        shared = _heads(k_TGN if shared_TR is None else shared_TR)
        self._found.attend_causally(
            q_AHQ.data_ptr(),
            ctypes.byref(key),
            ctypes.byref(shared),
            ctypes.byref(value),
            *(A, T, H, G, N, Q - N, V),
            scale,
            out_AX.data_ptr(),
            room.data_ptr(),
            self._threads,
        )
        return out_AX


def pairs_for(model: CausalLM) -> Pairs | None:
    """Return what computes the model's prompts, or None where prefill.c cannot: then PyTorch's operations do.

    It takes a processor with AVX512_BF16, bfloat16 weights, and sizes that are multiples of 32.
    """
    c = model.config
    kinds = {(p.dtype, p.device.type) for p in model.parameters() if p.ndim > 1}
    sizes = [c.hidden_size, c.intermediate_size, c.rope_dim]
    if c.n_routed_experts:
        sizes.append(c.moe_intermediate_size)
    if c.is_mla:
        sizes += [c.kv_lora_rank or 0, c.q_lora_rank or 0, c.qk_nope_head_dim, c.v_head_dim]
    if kinds != {(torch.bfloat16, "cpu")} or any(size % 32 for size in sizes):
        return None
    found = library()
    return Pairs(found) if found is not None and found.has_pairs() else None
