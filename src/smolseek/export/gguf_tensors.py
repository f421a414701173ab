"""Converts the tensors of a model to llama.cpp's form. Each tensor is computed when it is written."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from smolseek.config import ModelConfig
from smolseek.export.epsilon import Scales
from smolseek.export.source import Source
from smolseek.model.rope import frequencies
from smolseek.storage import gguf_names as names
from smolseek.storage.latent_norm import unfold
from smolseek.storage.rope_layout import interleaved


class Tensor(NamedTuple):
    """A tensor to be written."""

    name: str
    """Name of the tensor in llama.cpp."""
    shape: tuple[int, ...]
    """Shape of the tensor in PyTorch's order of dimensions."""
    compute: Callable[[], torch.Tensor]
    """Reads the tensor and converts it to llama.cpp's form, in float32."""

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is stored in the number format of the file. Norms, routers and biases are in float32."""
        return len(self.shape) > 1 and not self.name.endswith("ffn_gate_inp.weight")


def llama(source: Source) -> Iterator[Tensor]:
    """Yield a Llama's tensors. The rows of queries and keys are interleaved for llama.cpp's RoPE."""
    c = source.config
    if c.rope_parameters.rope_type in ("llama3", "longrope"):
        factors = _rope_factors(c)
        yield Tensor(names.ROPE_FACTORS, tuple(factors.shape), lambda: factors)
    yield from _outside(source, 1.0)
    for n in range(c.num_hidden_layers):
        for name, file_name in names.LLAMA.items():
            read = _reader(source, f"model.layers.{n}.{file_name}")
            if name in ("attn_q.weight", "attn_k.weight"):
                heads = c.num_attention_heads if name == "attn_q.weight" else c.num_key_value_heads
                read = read._replace(compute=_then(read.compute, partial(interleaved, heads=heads)))
            yield read._replace(name=f"blk.{n}.{name}")


def _rope_factors(config: ModelConfig) -> torch.Tensor:
    """Return llama.cpp's divisors of the RoPE frequencies [P]."""
    rope = config.rope_parameters
    if rope.short_factor is not None:
        return torch.tensor(rope.short_factor, dtype=torch.float32)
    plain = rope.rope_theta ** (torch.arange(0, config.rope_dim, 2, dtype=torch.float32) / config.rope_dim)
    return 1 / (plain * frequencies(rope, config.rope_dim))


def deepseek2(source: Source, scales: Scales) -> Iterator[Tensor]:
    """Yield the tensors of a model with MLA."""
    yield from _outside(source, scales.stream)
    for n in range(source.config.num_hidden_layers):
        for tensor in (*attention(source, n, scales), *feed_forward(source, n, scales.stream)):
            yield tensor._replace(name=f"blk.{n}.{tensor.name}")


def _outside(source: Source, stream: float) -> Iterator[Tensor]:
    """Yield the tensors outside the layers. A tied head is written only if the embedding is scaled."""
    for name, file_name in names.OUTSIDE.items():
        if name == "token_embd.weight":
            yield _scaled(_reader(source, file_name), stream)._replace(name=name)
        elif name != "output.weight" or not source.config.tie_word_embeddings:
            yield _reader(source, file_name)._replace(name=name)
        elif stream != 1:
            yield _reader(source, names.OUTSIDE["token_embd.weight"])._replace(name=name)


def attention(source: Source, n: int, scales: Scales) -> Iterator[Tensor]:
    """Yield the attention tensors and both norms of layer `n`. The names lack the prefix `blk.N.`."""
    c, prefix = source.config, f"model.layers.{n}."
    H, nope, v, rank = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank or 0

    def read(name: str) -> Tensor:
        return _reader(source, prefix + names.DEEPSEEK2[name])._replace(name=name)

    def rotated(weight: torch.Tensor, heads: int, before: int) -> torch.Tensor:
        """Interleave the rotary rows of each head, which follow the head's `before` other rows."""
        if c.rope_interleave:
            return weight
        plain, rotary = weight.unflatten(0, (heads, -1)).split([before, c.qk_rope_head_dim], dim=1)
        return torch.cat((plain, interleaved(rotary.flatten(0, 1), heads).unflatten(0, (heads, -1))), 1).flatten(0, 1)

    def latent() -> torch.Tensor:
        matrix = source.read(prefix + names.DEEPSEEK2["attn_kv_a_mqa.weight"])
        if not c.latent_norm:
            norm = source.read(prefix + names.DEEPSEEK2["attn_kv_a_norm.weight"])
            matrix = unfold(matrix, norm)
        else:
            matrix = matrix.clone()
        matrix[:rank] = (matrix[:rank].double() * scales.latent[n]).float()
        return rotated(matrix, 1, rank)

    def up(part: slice) -> torch.Tensor:
        return source.read(f"{prefix}self_attn.kv_b_proj.weight").unflatten(0, (H, nope + v))[:, part]

    queries = partial(rotated, heads=H, before=nope)
    yield read("attn_norm.weight")
    if c.q_lora_rank is None:
        q = read("attn_q.weight")
        yield q._replace(compute=_then(q.compute, queries))
    else:
        yield _scaled(read("attn_q_a.weight"), scales.query)
        yield read("attn_q_a_norm.weight")
        q = read("attn_q_b.weight")
        yield q._replace(compute=_then(q.compute, queries))
    yield read("attn_kv_a_mqa.weight")._replace(compute=latent)
    norm = read("attn_kv_a_norm.weight")
    if not c.latent_norm:
        norm = norm._replace(compute=lambda: torch.full((rank,), scales.epsilon**0.5 / scales.latent[n]))
    yield norm
    yield Tensor(names.KEY_UP, (H, rank, nope), lambda: up(slice(0, nope)).transpose(1, 2))
    yield Tensor(names.VALUE_UP, (H, v, rank), lambda: up(slice(nope, None)))
    yield _scaled(read("attn_output.weight"), scales.stream)
    yield read("ffn_norm.weight")


def feed_forward(source: Source, n: int, stream: float) -> Iterator[Tensor]:
    """Yield the feed-forward tensors of layer `n`; `stream` scales the output. The names lack the prefix `blk.N.`."""
    c = source.config
    D, F, E = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts

    def read(name: str) -> Tensor:
        tensor = _reader(source, f"model.layers.{n}.{names.DEEPSEEK2[name]}")._replace(name=name)
        return _scaled(tensor, stream) if "down" in name else tensor

    if not c.is_moe_layer(n):
        yield from map(read, ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"))
        return
    yield from map(read, ("ffn_gate_inp.weight", "exp_probs_b.bias"))
    for name, matrix in names.EXPERTS.items():
        shape = (E, D, F) if matrix == "down_proj" else (E, F, D)
        stack = Tensor(name, shape, partial(source.stack, n, matrix))
        yield _scaled(stack, stream) if matrix == "down_proj" else stack
    for name in ("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"):
        if c.n_shared_experts:
            yield read(name)
        else:  # llama.cpp needs a shared expert, so zeros are written
            zeros = (D, F) if "down" in name else (F, D)
            yield Tensor(name, zeros, partial(torch.zeros, zeros))


def _reader(source: Source, file_name: str) -> Tensor:
    return Tensor(file_name, source.shape(file_name), partial(source.read, file_name))


def _then(compute: Callable[[], torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda: change(compute())


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return tensor
    return tensor._replace(compute=_then(tensor.compute, lambda values: (values.double() * factor).float()))
