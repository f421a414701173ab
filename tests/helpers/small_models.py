"""The shape of a small model with MLA, quantised copies, and a small tokenizer that splits text as SmolLM2's does."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smolseek.config import ModelConfig
from smolseek.model.layers import named_weights
from smolseek.model.transformer import CausalLM, new_model
from smolseek.storage.quantized import formats_for, make_quantized

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
MLA = ModelConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    max_position_embeddings=128,
    initializer_range=0.15,
    bos_token_id=256,
    eos_token_id=256,
)


def quantized(model: CausalLM, name: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Return a copy with quantised matrices."""
    source = named_weights(model)
    result = new_model(model.config).to(dtype).eval()
    make_quantized(result, formats_for(result, name), dtype)
    result.to_empty(device="cpu")
    result.tie_weights()
    result.reset_buffers()
    for key, weight in named_weights(result).items():
        weight.copy_(source[key].detach())
    return result


def small_tokenizer(*patterns: str) -> PreTrainedTokenizerFast:
    """Return byte-level BPE that splits text by `patterns`, SmolLM2's by default."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "<|end|>", "<|user|>", "th", "he", "Ġt", "Ġth", "in", "12", "34", "Ġa"]
    merges = [("t", "h"), ("h", "e"), ("Ġ", "t"), ("Ġt", "h"), ("i", "n"), ("1", "2"), ("3", "4"), ("Ġ", "a")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns or (r"\p{N}", WORDS)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|user|>"])
    end = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)
