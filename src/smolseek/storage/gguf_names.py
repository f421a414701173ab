"""llama.cpp's names of tensors, with the names in a Hugging Face folder. This module does not import torch."""

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Tensors outside the layers."""

_SHARED = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
LLAMA = _SHARED | {
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
}
"""Tensors of a Llama layer; the names lack the prefixes `blk.N.` and `model.layers.N.`."""

DEEPSEEK2 = _SHARED | {
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
}
"""Tensors of a layer with MLA. Only older files have `attn_kv_b`; newer files have `KEY_UP` and `VALUE_UP` instead."""

KEY_UP, VALUE_UP = "attn_k_b.weight", "attn_v_b.weight"
"""The two parts of kv_b_proj: each head's transposed rows for keys [heads, rank, nope] and rows for values
[heads, v, rank]."""

EXPERTS = {
    "ffn_gate_exps.weight": "gate_proj",
    "ffn_up_exps.weight": "up_proj",
    "ffn_down_exps.weight": "down_proj",
}
"""The routed experts, as stacks of matrices [experts, rows, columns]."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor in which llama.cpp stores the scaled RoPE of Llama 3.1 and later: a divisor for each frequency."""
