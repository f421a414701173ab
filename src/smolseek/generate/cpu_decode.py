"""A decoding step on a CPU through cpu_decode.c, which binds to the model's modules and reads their weights in place.

One of two exceptions to "the forward pass stands once": a step is bound by reading the weights, and by what Python and
PyTorch do around some hundred small operations. Without a C compiler, for another number format or on another device
`bind` gives None, and the engine takes the model's forward pass.
"""

import ctypes
import functools
import time
from pathlib import Path

import torch

from smolseek.model.attention import GQA, MLA
from smolseek.model.cache import Cache
from smolseek.model.moe import MLP, MoE
from smolseek.model.norm import RMSNorm
from smolseek.model.transformer import Block, CausalLM
from smolseek.ops import backend

SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_decode.c", "cpu_attention.c"))
MAX_BATCH = 512  # as in cpu_decode.h


def _struct(name: str, **fields: str) -> type[ctypes.Structure]:
    """Make a struct class from names by type, in the order of cpu_decode.h."""
    types = {"pointers": ctypes.c_void_p, "ints": ctypes.c_int64, "floats": ctypes.c_float}
    members = [(member, types[kind.rstrip("_")]) for kind, names in fields.items() for member in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_Layer = _struct(
    "_Layer",
    pointers="input_norm post_norm q_a q k v o q_a_bias q_a_norm k_bias k_norm o_bias key_up value_up "
    "router router_bias up down up_bias down_bias gate_shared up_shared down_shared",
    ints="shared",
    pointers_="cache",
)
_Model = _struct(
    "_Model",
    ints="bfloat16 layers vocab D H G mla q_rank L N R V interleave E K F gated "
    "groups top_groups normalise cached C widest",
    floats="eps latent_eps factor scale",
    pointers="embedding head norm cos sin layer",
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled files, or None where they are turned off or cannot be built."""
    found = backend.compiled(*SOURCES)
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.work_floats.argtypes, found.work_floats.restype = (pointer, number, number), number
        found.step.argtypes, found.step.restype = (pointer, number, pointer, pointer, pointer, pointer, number), None
    return found


class _Team:
    """How many threads to take: all, or one where the machine has so much else to do that they wait for each other.

    A step has some hundred meeting points; where a thread has to wait for its turn on the processor at each, two are
    many times slower than one. The result has the same bits either way. The slower choice is tried again now and
    then, at a cost of about a sixteenth of the time.
    """

    def __init__(self, threads: int) -> None:
        self._seconds = dict.fromkeys((threads, 1), 0.0)
        self._wait = 0

    def choose(self) -> int:
        """Return the number of threads for the next step."""
        best = min(self._seconds, key=self._seconds.__getitem__)
        if len(self._seconds) == 1 or not self._seconds[best]:
            return best
        worst = max(self._seconds, key=self._seconds.__getitem__)
        self._wait += 1
        if self._wait > 16 * self._seconds[worst] / self._seconds[best]:
            self._wait = 0
            return worst
        return best

    def note(self, threads: int, seconds: float) -> None:
        """Learn how long a step took."""
        before = self._seconds[threads]
        self._seconds[threads] = (before + seconds) / 2 if before else seconds


class CpuDecoder:
    """A model and a cache bound to cpu_decode.c. It reads the model's weights where they lie."""

    def __init__(self, found: ctypes.CDLL, model: CausalLM, cache: Cache) -> None:
        self._step = found.step
        self._vocab, self._rows, self._capacity = model.config.vocab_size, cache.rows, cache.capacity
        self._alive: list[torch.Tensor] = []
        self._model = self._bind(model, cache)
        self._address = ctypes.addressof(self._model)
        self._team = _Team(torch.get_num_threads())
        floats = found.work_floats(self._address, cache.rows, torch.get_num_threads())
        self._work = torch.zeros(floats, dtype=torch.float32)

    def step(self, ids_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
        """Run one token (int64) of each row at its position and cache it -> logits [B, V] in float32."""
        B = ids_B.shape[0]
        assert self._rows >= B and int(positions_B.max()) < self._capacity  # it writes there without a check of its own
        logits = torch.empty(B, self._vocab, dtype=torch.float32)
        pointers = [tensor.data_ptr() for tensor in (ids_B, positions_B, self._work, logits)]
        threads = self._team.choose()
        begun = time.perf_counter()
        self._step(self._address, B, *pointers, threads)
        self._team.note(threads, time.perf_counter() - begun)
        return logits

    def _at(self, tensor: torch.Tensor | None, *, small: bool = False) -> int | None:
        """Return a tensor's address and keep it alive; `small` ones (norms, biases, the router) as float32."""
        if tensor is None:
            return None
        tensor = (tensor.detach().float() if small else tensor.detach()).contiguous()
        self._alive.append(tensor)
        return tensor.data_ptr()

    def _bind(self, model: CausalLM, cache: Cache) -> ctypes.Structure:
        c, decoder = model.config, model.model
        layers = (_Layer * c.num_hidden_layers)()
        widest, scale = 0, 1.0
        for entry, block, held in zip(layers, decoder.layers, cache.layers, strict=True):
            assert isinstance(block, Block)
            entry.input_norm = self._at(block.input_layernorm.weight, small=True)
            entry.post_norm = self._at(block.post_attention_layernorm.weight, small=True)
            entry.cache = self._at(held)
            self._attention(entry, block.self_attn)
            self._feed_forward(entry, block.mlp)
            widest, scale = max(widest, entry.shared), block.self_attn.scale
        cos, sin = decoder.rope.each(torch.arange(cache.capacity))
        built = _Model(
            bfloat16=int(model.lm_head.weight.dtype == torch.bfloat16),
            layers=c.num_hidden_layers,
            vocab=c.vocab_size,
            D=c.hidden_size,
            H=c.num_attention_heads,
            G=1 if c.is_mla else c.num_key_value_heads,
            mla=int(c.is_mla),
            q_rank=(c.q_lora_rank or 0) if c.is_mla else 0,
            L=c.kv_lora_rank or 0,
            N=c.qk_nope_head_dim if c.is_mla else 0,
            R=c.rope_dim,
            V=c.v_head_dim if c.is_mla else 0,
            interleave=int(c.is_mla and c.rope_interleave),
            E=c.n_routed_experts,
            K=c.num_experts_per_tok,
            F=c.moe_intermediate_size,
            gated=int(c.mlp_gated),
            groups=c.n_group,
            top_groups=c.topk_group,
            normalise=int(c.norm_topk_prob),
            cached=c.cache_features,
            C=cache.capacity,
            widest=widest,
            eps=c.rms_norm_eps,
            latent_eps=1e-6,
            factor=c.routed_scaling_factor,
            scale=scale,
            embedding=self._at(decoder.embed_tokens.weight),
            head=self._at(model.lm_head.weight),
            norm=self._at(decoder.norm.weight, small=True),
            cos=self._at(cos, small=True),
            sin=self._at(sin, small=True),
            layer=ctypes.addressof(layers),
        )
        self._layers = layers
        return built

    def _attention(self, entry: ctypes.Structure, attention: MLA | GQA) -> None:
        entry.o = self._at(attention.o_proj.weight)
        entry.o_bias = self._at(attention.o_proj.bias, small=True)
        if isinstance(attention, GQA):
            matrices = attention.q_proj, attention.k_proj, attention.v_proj
            entry.q, entry.k, entry.v = (self._at(matrix.weight) for matrix in matrices)
            return
        if attention.compressed_query:
            entry.q_a = self._at(attention.q_a_proj.weight)
            entry.q_a_bias = self._at(attention.q_a_proj.bias, small=True)
            entry.q_a_norm = self._at(attention.q_a_layernorm.weight, small=True)
        entry.q = self._at((attention.q_b_proj if attention.compressed_query else attention.q_proj).weight)
        entry.k = self._at(attention.kv_a_proj_with_mqa.weight)
        entry.k_bias = self._at(attention.kv_a_proj_with_mqa.bias, small=True)
        if isinstance(attention.kv_a_layernorm, RMSNorm):  # a model made from a Llama has no norm there
            entry.k_norm = self._at(attention.kv_a_layernorm.weight, small=True)
        w_HXL = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))
        entry.key_up = self._at(w_HXL[:, : attention.nope].transpose(1, 2))
        entry.value_up = self._at(attention.kv_b_proj.weight)

    def _feed_forward(self, entry: ctypes.Structure, mlp: MLP | MoE) -> None:
        shared: MLP | None
        if isinstance(mlp, MoE):
            experts = mlp.experts
            entry.router = self._at(mlp.gate.weight, small=True)
            entry.router_bias = self._at(mlp.gate.e_score_correction_bias, small=True)
            entry.up = self._at(experts.gate_up_proj if experts.gated else experts.up_proj)
            entry.down = self._at(experts.down_proj)
            entry.up_bias = self._at(experts.up_bias, small=True)
            entry.down_bias = self._at(experts.down_bias, small=True)
            shared = mlp.shared_experts if mlp.n_shared_experts else None
        else:
            shared = mlp
        if shared is not None:
            entry.shared = shared.gate_proj.weight.shape[0]
            entry.gate_shared = self._at(shared.gate_proj.weight)
            entry.up_shared = self._at(shared.up_proj.weight)
            entry.down_shared = self._at(shared.down_proj.weight)


def bind(model: CausalLM, cache: Cache) -> CpuDecoder | None:
    """Bind the model to cpu_decode.c, or return None where that is not possible."""
    kinds = {p.dtype for p in model.parameters() if p.ndim > 1}
    kind = model.lm_head.weight.dtype
    if model.lm_head.weight.device.type != "cpu" or kind not in (torch.float32, torch.bfloat16) or len(kinds) > 1:
        return None
    if cache.rows > MAX_BATCH or cache.dtype != kind:
        return None
    found = library()
    return CpuDecoder(found, model, cache) if found is not None else None
