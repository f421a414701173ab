"""Runs a decoding step on a CPU with cpu_decode.c, which reads the weights of the model's modules in place.

The forward pass is written once in `model/`, with two exceptions: this file and `static.py`. A decoding step takes as
long as reading the weights, and PyTorch would add the overhead of some hundred small operations. A matrix may be
float32, bfloat16 or quantised. Without a C compiler, for another number format, or on another device, the engine uses
the model's forward pass.
"""

import ctypes
import functools
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smolseek.model.layers import named_weights
from smolseek.model.transformer import CausalLM
from smolseek.ops import backend
from smolseek.ops.quantized import FORMATS, QuantizedWeight

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_decode.c", "cpu_attention.c", "cpu_linear.c"))
MAX_BATCH = 512  # as in cpu_decode.h
CHUNK = 64  # as in cpu_decode.h

_LAYER = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q": "self_attn.q_b_proj.weight self_attn.q_proj.weight",
    "k": "self_attn.kv_a_proj_with_mqa.weight self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_a_bias": "self_attn.q_a_proj.bias",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "k_bias": "self_attn.kv_a_proj_with_mqa.bias",
    "k_norm": "self_attn.kv_a_layernorm.weight",
    "o_bias": "self_attn.o_proj.bias",
    "key_up": "",
    "value_up": "self_attn.kv_b_proj.weight",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "up": "mlp.experts.gate_up_proj mlp.experts.up_proj",
    "down": "mlp.experts.down_proj",
    "up_bias": "mlp.experts.up_bias",
    "down_bias": "mlp.experts.down_bias",
    "gate_shared": "mlp.shared_experts.gate_proj.weight mlp.gate_proj.weight",
    "up_shared": "mlp.shared_experts.up_proj.weight mlp.up_proj.weight",
    "down_shared": "mlp.shared_experts.down_proj.weight mlp.down_proj.weight",
}
"""The tensors of the struct `Layer` in cpu_decode.h, in order, with their possible names in a layer of the model."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled C files, or None if they are disabled or cannot be built."""
    compiled = backend.compiled(*SOURCES)
    if compiled is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        compiled.work_floats.argtypes, compiled.work_floats.restype = (pointer, number, number, number), number
        compiled.step.argtypes = pointer, number, pointer, pointer, pointer, number, pointer, pointer, pointer, number
        compiled.summarise.argtypes = pointer, number, number, pointer, pointer, number
        compiled.step.restype = compiled.summarise.restype = None
        compiled.head.argtypes, compiled.head.restype = (pointer, number, pointer, pointer, number), None
    return compiled


class _Threads:
    """Chooses the number of threads: all threads, or one thread on a machine so busy that the threads wait for a core.

    A decoding step has some hundred barriers. If a thread has to wait for a core at each barrier, two threads are many
    times slower than one thread. The number of threads does not change the bits of the result. The slower choice is
    tried again now and then, which costs about a sixteenth of the time.
    """

    def __init__(self, threads: int) -> None:
        self._seconds = dict.fromkeys((threads, 1), 0.0)
        self._steps = 0

    def choose(self) -> int:
        """Return the number of threads for the next step."""
        best, worst = (choose(self._seconds, key=self._seconds.__getitem__) for choose in (min, max))
        if not self._seconds[best]:
            return best
        self._steps += 1
        if self._steps > 16 * self._seconds[worst] / self._seconds[best]:
            self._steps = 0
            return worst
        return best

    def record(self, threads: int, seconds: float) -> None:
        """Record how long a step took with this number of threads."""
        before = self._seconds[threads]
        self._seconds[threads] = (before + seconds) / 2 if before else seconds


class CpuDecoder:
    """A model and the memory of a cache bound to cpu_decode.c, which reads the model's weights in place.

    Args:
        compiled: the compiled C files.
        model: the model.
        layers: for each layer, the memory of the cache [..., F]; token number i is its i-th row.
        longest: number of tokens of the longest possible sequence.
    """

    def __init__(self, compiled: ctypes.CDLL, model: CausalLM, layers: Sequence[torch.Tensor], longest: int) -> None:
        self._step, self._work_floats = compiled.step, compiled.work_floats
        self._head, self._summarise = compiled.head, compiled.summarise
        self._vocab, self._longest = model.config.vocab_size, longest
        self._routers, self._top_k = len(model.routers), model.config.num_experts_per_tok
        self._alive: list[torch.Tensor] = []
        structs = [self._layer_struct(*layer) for layer in zip(model.model.layers, layers, strict=True)]
        self._layers = ctypes.create_string_buffer(b"".join(self._pack(layer) for layer in structs))
        widest = max(int(layer["shared"]) for layer in structs)
        self._model = ctypes.create_string_buffer(self._pack(self._model_struct(model, longest, widest)))
        self._most_threads = torch.get_num_threads()
        self._threads = _Threads(self._most_threads)
        self._work = torch.empty(0)

    def step(
        self, ids_B: torch.Tensor, positions_B: torch.Tensor, first_BX: torch.Tensor, *, experts: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one token of each sequence at its position and cache it. All arguments are int64.

        Args:
            ids_B: the tokens of the sequences.
            positions_B: the positions of the tokens.
            first_BX: for every CHUNK positions of each sequence, the number of the first token in the cache.
            experts: whether the chosen experts are returned.

        Returns:
            The logits [B, V] in float32, and the chosen experts [layers with experts, B, K] or None.
        """
        B, X = first_BX.shape
        last = int(positions_B.max())  # the C code checks no bounds
        assert B <= MAX_BATCH and last < self._longest and last < X * CHUNK and first_BX.is_contiguous()
        logits_BV = torch.empty(B, self._vocab, dtype=torch.float32)
        experts_LBK = torch.empty(self._routers, B, self._top_k, dtype=torch.int64) if experts else None
        self._reserve(B, int((positions_B // CHUNK + 1).sum()))
        pointers = [tensor.data_ptr() for tensor in (ids_B, positions_B, first_BX)]
        results = [self._work.data_ptr(), logits_BV.data_ptr(), None if experts_LBK is None else experts_LBK.data_ptr()]
        threads = self._threads.choose()
        start = time.perf_counter()
        self._step(self._model, B, *pointers, X, *results, threads)
        self._threads.record(threads, time.perf_counter() - start)
        return logits_BV, experts_LBK

    def summarise(self, logits_BV: torch.Tensor) -> tuple[list[int], list[float]]:
        """Return the likeliest token and the logsumexp of each sequence, with the same bits in any batch."""
        B, V = logits_BV.shape
        assert logits_BV.is_contiguous() and logits_BV.dtype == torch.float32
        best_B, total_B = torch.empty(B, dtype=torch.int64), torch.empty(B)
        pointers = [tensor.data_ptr() for tensor in (best_B, total_B)]
        self._summarise(logits_BV.data_ptr(), B, V, *pointers, min(B, torch.get_num_threads()))
        return best_B.tolist(), total_B.tolist()

    def _reserve(self, batch: int, chunks: int) -> None:
        """Enlarge the memory of intermediate results, if it is too small, so that it also fits twice the tokens."""
        threads = self._most_threads  # torch's number may have changed since then
        if self._work_floats(self._model, batch, chunks, threads) > len(self._work):
            self._work = torch.zeros(self._work_floats(self._model, batch, 2 * chunks, threads), dtype=torch.float32)

    def head(self, hidden_XD: torch.Tensor) -> torch.Tensor:
        """Return the logits [X, V] of normalised hidden states, in float32.

        PyTorch would round the logits to the number format of the head. In bfloat16 the likeliest tokens then often
        have equal logits.
        """
        logits = []
        for hidden in hidden_XD.float().split(MAX_BATCH):
            h_XD, logits_XV = hidden.contiguous(), torch.empty(len(hidden), self._vocab, dtype=torch.float32)
            pointers = h_XD.data_ptr(), logits_XV.data_ptr()
            self._head(self._model, len(hidden), *pointers, torch.get_num_threads())
            logits.append(logits_XV)
        return torch.cat(logits)

    def _pack(self, values: dict[str, Any]) -> bytes:
        """Pack `values` as a struct of cpu_decode.h.

        Integers become int64_t, and floats become float. Norms, biases, the router and the angles of RoPE are converted
        to float32 and become pointers. Every other tensor becomes a `Matrix`, a pointer with a number format, and is
        used in place. None becomes a null pointer.
        """
        types, fields = "", []
        for name, value in values.items():
            if isinstance(value, float | int):
                types += "f" if isinstance(value, float) else "q"
                fields.append(value)
                continue
            small = name.endswith(("norm", "bias")) or name in ("router", "cos", "sin")
            pointer, number_format = self._in_place(value, small)
            types += "q" if small else "qq"  # a pointer has eight bytes, too
            fields += [pointer] if small else [pointer, number_format]
        return struct.pack(types, *fields)

    def _in_place(self, value: torch.Tensor | QuantizedWeight | None, small: bool) -> tuple[int, int]:
        """Return the address of a weight, and the index of its number format in `FORMATS`."""
        if value is None:
            return 0, 0
        if isinstance(value, QuantizedWeight):
            name, data = value.name, value.data
        else:
            data = value.detach().float() if small else value.detach()
            name = str(data.dtype).removeprefix("torch.")
        self._alive.append(data.contiguous())
        return self._alive[-1].data_ptr(), FORMATS.index(name)

    def _layer_struct(self, block: Any, cached: torch.Tensor) -> dict[str, Any]:
        weights = named_weights(block)
        values: dict[str, Any] = {}
        for name, keys in _LAYER.items():
            values[name] = next((weights[key] for key in keys.split() if key in weights), None)
        if values["value_up"] is not None:
            w_HXL = values["value_up"].unflatten(0, (block.self_attn.heads, -1))
            values["key_up"] = w_HXL[:, : block.self_attn.nope].transpose(1, 2)
        shared = values["gate_shared"]
        return values | {"shared": 0 if shared is None else len(shared), "cache": cached}

    def _model_struct(self, model: CausalLM, longest: int, widest: int) -> dict[str, Any]:
        c, decoder = model.config, model.model
        block: Any = decoder.layers[0]
        cos, sin = decoder.rope.each(torch.arange(longest))
        return {
            "layers": c.num_hidden_layers,
            "vocab": c.vocab_size,
            "D": c.hidden_size,
            "H": c.num_attention_heads,
            "G": 1 if c.is_mla else c.num_key_value_heads,
            "mla": int(c.is_mla),
            "q_rank": (c.q_lora_rank or 0) if c.is_mla else 0,
            "L": c.kv_lora_rank or 0,
            "N": c.qk_nope_head_dim if c.is_mla else 0,
            "R": c.rope_dim,
            "V": c.v_head_dim if c.is_mla else 0,
            "interleave": int(c.is_mla and c.rope_interleave),
            "E": c.n_routed_experts,
            "K": c.num_experts_per_tok,
            "F": c.moe_intermediate_size,
            "gated": int(c.mlp_gated),
            "groups": c.n_group,
            "top_groups": c.topk_group,
            "normalise": int(c.norm_topk_prob),
            "cached": c.cache_features,
            "widest": widest,
            "eps": float(c.rms_norm_eps),
            "latent_eps": float(c.latent_norm_eps),
            "factor": float(c.routed_scaling_factor),
            "scale": block.self_attn.scale,
            "embedding": decoder.embed_tokens.weight,
            "head": model.lm_head.weight,
            "norm": decoder.norm.weight,
            "cos": cos,
            "sin": sin,
            "layer": ctypes.addressof(self._layers),
        }


def bind(model: CausalLM, layers: Sequence[torch.Tensor], longest: int, batch: int) -> CpuDecoder | None:
    """Return a CpuDecoder for at most `batch` sequences, or None if cpu_decode.c cannot be used. See CpuDecoder."""
    weights = named_weights(model).values()
    if {weight.device.type for weight in weights} != {"cpu"}:
        return None
    dtypes = {weight.dtype for weight in weights if weight.ndim > 1} | {layer.dtype for layer in layers}
    if not dtypes <= {torch.float32, torch.bfloat16} or batch > MAX_BATCH:
        return None
    compiled = library()
    return CpuDecoder(compiled, model, layers, longest) if compiled is not None else None
