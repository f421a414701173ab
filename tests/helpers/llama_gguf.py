"""Small Llamas in GGUF files, a number format for each matrix."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

WIDTH, NEURONS, VOCABULARY = 64, 96, 96


def write_llama(path: Path, number_format: str, *, tied: bool, others: Mapping[str, str] | None = None) -> Path:
    """Write two layers of width 64; `others` names the number formats of some tensors by llama.cpp's names."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([chr(33 + i) for i in range(93)] + ['!"', "a!", "<end>"])
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(95)
    writer.add_eos_token_id(95)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {} if tied else {"output": (VOCABULARY, WIDTH)}
    for n in range(2):
        for name in ("attn_q", "attn_output"):
            shapes[f"blk.{n}.{name}"] = (WIDTH, WIDTH)
        for name in ("attn_k", "attn_v"):
            shapes[f"blk.{n}.{name}"] = (WIDTH // 2, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{n}.{name}"] = (NEURONS, WIDTH)
        shapes |= {f"blk.{n}.ffn_down": (WIDTH, NEURONS)}
        shapes |= {f"blk.{n}.attn_norm": (WIDTH,), f"blk.{n}.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        values = rng.normal(0.0, 0.15, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + values)
        else:
            kind = gguf.GGMLQuantizationType[(others or {}).get(name, number_format)]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
