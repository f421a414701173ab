"""Hugging Face folders: smolseek reads what stock transformers writes, and the other way round."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smolseek.config import ModelConfig, RopeConfig
from smolseek.errors import SmolseekError
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import PRESETS
from smolseek.storage import safetensors_file
from smolseek.storage.hf_config import config_from_hf, config_to_hf
from smolseek.storage.hf_folder import load_model, load_weights, read_config, save_folder

DEEPSEEK = ModelConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=1.7,
    max_position_embeddings=64,
    initializer_range=0.1,
    eos_token_id=(1, 2),
)
LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    rope_parameters=RopeConfig(rope_theta=5000.0),
    rms_norm_eps=1e-5,
    initializer_range=0.1,
)
SEED = ModelConfig(
    model_type="smolseek_gqa_moe",
    vocab_size=101,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    mlp_gated=False,
    mlp_bias=True,
    initializer_range=0.1,
)
YARN = RopeConfig(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
    mscale=1.0, mscale_all_dim=0.8,
)  # fmt: skip
CASES = {
    "mla_moe": DEEPSEEK,
    "full_query_tied_no_shared": replace(DEEPSEEK, q_lora_rank=None, tie_word_embeddings=True, n_shared_experts=0),
    "tied_without_latent_norm": replace(DEEPSEEK, latent_norm=False, tie_word_embeddings=True),
    "dense_biased_halves": replace(DEEPSEEK, n_routed_experts=0, attention_bias=True, rope_interleave=False),
    "yarn": replace(DEEPSEEK, rope_parameters=YARN),
    "llama": LLAMA,
    "llama3": replace(
        LLAMA,
        head_dim=None,
        tie_word_embeddings=False,
        rope_parameters=RopeConfig(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
}
IDS = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(1))


def random_model(config: ModelConfig) -> CausalLM:
    """Return a model with random norms and biases, because ones and zeros would hide mistakes."""
    model = new_model(config, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "bias" in name:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_opens_a_saved_folder(name, tmp_path, caplog):
    ours = random_model(CASES[name])
    save_folder(ours, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert (logits(theirs) - logits(ours)).abs().max() <= 2e-5
    warnings = [r.getMessage() for r in caplog.records if r.levelname != "INFO"]
    assert not warnings, warnings


@pytest.mark.parametrize("name", CASES)
def test_we_open_what_transformers_saves(name, tmp_path):
    # smolseek writes random values, so that none is an initial value. transformers then saves the model, and smolseek
    # reads it.
    save_folder(random_model(CASES[name]), tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    ours = load_model(str(tmp_path / "b"))
    assert not ours.model.training and ours.tokenizer is None and ours.path == tmp_path / "b"
    assert (logits(theirs) - logits(ours.model)).abs().max() <= 2e-5


@pytest.mark.parametrize("config", [*CASES.values(), SEED])
def test_saved_and_loaded_is_the_same_model(config, tmp_path):
    ours = random_model(config)
    save_folder(ours, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(logits(loaded.model), logits(ours))
    head, embedding = loaded.model.lm_head.weight, loaded.model.model.embed_tokens.weight
    assert (head is embedding) == config.tie_word_embeddings
    other = new_model(config, seed=9).eval()
    load_weights(other, tmp_path)
    assert torch.equal(logits(other), logits(ours))


@pytest.mark.parametrize("latent_norm", [True, False])
def test_a_tied_deepseek_head_is_written_for_other_engines_and_tied_again(latent_norm, tmp_path):
    config = replace(DEEPSEEK, latent_norm=latent_norm, tie_word_embeddings=True)
    ours = random_model(config)
    save_folder(ours, tmp_path)
    tensors, values = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert values["tie_word_embeddings"] is False and values["smolseek_tied_embeddings"] is True
    assert read_config(tmp_path) == load_model(tmp_path).config == config
    # Older folders have no head tensor, and their configuration says that the head is tied.
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    del values["smolseek_tied_embeddings"], values["rope_theta"], values["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    assert read_config(tmp_path) == config and torch.equal(logits(load_model(tmp_path).model), logits(ours))


def test_a_head_that_another_program_trained_is_not_tied_again(tmp_path):
    save_folder(random_model(CASES["full_query_tied_no_shared"]), tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        theirs.lm_head.weight[7] += 0.5
    theirs.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["smolseek_tied_embeddings"] is True
    ours = load_model(tmp_path / "b")
    assert not ours.config.tie_word_embeddings and read_config(tmp_path / "b") == ours.config
    assert (logits(theirs) - logits(ours.model)).abs().max() <= 2e-5


def test_a_tied_matrix_that_is_not_finite_is_still_tied(tmp_path):
    config = CASES["full_query_tied_no_shared"]
    ours = random_model(config)
    ours.model.embed_tokens.weight.data[3] = float("nan")
    save_folder(ours, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == config and loaded.model.lm_head.weight[3].isnan().all()


def test_old_names_of_the_rope_settings_are_written_for_other_engines(tmp_path):
    for config, scaling in ((CASES["mla_moe"], None), (CASES["yarn"], "yarn"), (LLAMA, None)):
        values = config_to_hf(config)
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"]
        assert (values["rope_scaling"] or {}).get("rope_type") == scaling


def test_file_names_of_the_experts(tmp_path):
    save_folder(random_model(SEED), tmp_path / "seed")
    save_folder(random_model(DEEPSEEK), tmp_path / "deepseek")
    names = set(load_file(tmp_path / "seed" / "model.safetensors"))
    assert {f"model.layers.1.mlp.experts.3.{p}_proj.{k}" for p in ("up", "down") for k in ("weight", "bias")} <= names
    tensors = load_file(tmp_path / "deepseek" / "model.safetensors")
    stack = random_model(DEEPSEEK).state_dict()["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(tensors["model.layers.2.mlp.experts.5.gate_proj.weight"], stack[5, :20])
    assert torch.equal(tensors["model.layers.2.mlp.experts.5.up_proj.weight"], stack[5, 20:])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_config_json(name):
    config = PRESETS[name]()
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config))), "x") == config


def test_bfloat16_keeps_the_balancing_bias_in_float32(tmp_path):
    ours = random_model(DEEPSEEK)
    save_folder(ours, tmp_path)
    save_folder(load_model(tmp_path, dtype="bfloat16").model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(tmp_path, dtype="auto").model
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    biases = [name for name in kinds if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(kinds.pop(name) == torch.float32 for name in biases)
    assert set(kinds.values()) == {torch.bfloat16}
    for mine, theirs in zip(ours.routers, loaded.routers, strict=True):
        assert torch.equal(mine.e_score_correction_bias, theirs.e_score_correction_bias)
    assert torch.equal(loaded.model.rope.short_P, ours.model.rope.short_P)
    assert {p.dtype for p in load_model(tmp_path, dtype="float32").model.parameters()} == {torch.float32}


def test_shards_load_alike_and_replace_one_another(tmp_path, monkeypatch):
    ours = random_model(DEEPSEEK)
    save_folder(ours, tmp_path)
    monkeypatch.setattr(safetensors_file, "SHARD_BYTES", 20_000)
    save_folder(ours, tmp_path)
    monkeypatch.undo()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == sorted(set(index["weight_map"].values())) and len(shards) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.state_dict().values())
    assert torch.equal(logits(load_model(tmp_path).model), logits(ours))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(theirs) - logits(ours)).abs().max() <= 2e-5
    (tmp_path / shards[1]).unlink()
    with pytest.raises(SmolseekError, match=shards[1]):
        load_model(tmp_path)
    save_folder(ours, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*safetensors*")) == ["model.safetensors"]


def rewrite(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_tensors_that_do_not_match_are_named(tmp_path):
    save_folder(random_model(DEEPSEEK), tmp_path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.3.x": torch.ones(4)}))
    with pytest.raises(SmolseekError, match=r"unknown tensor model\.layers\.3\.x"):
        load_model(tmp_path)
    # If the configuration has one MTP layer, the same tensor belongs to this layer.
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 1}))
    load_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({name: t[name].to(torch.int8)}))
    with pytest.raises(SmolseekError, match=rf"{name} is stored as int8"):
        load_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({name: torch.ones(3, 32)}))
    with pytest.raises(SmolseekError, match=rf"{name} has shape \[3, 32\].*\[20, 32\]"):
        load_model(tmp_path)
    rewrite(tmp_path, lambda t: t.pop(name))
    with pytest.raises(SmolseekError, match=f"1 tensors are missing, the first is {name}"):
        load_model(tmp_path)


def test_a_head_that_contradicts_the_tie_is_taken(tmp_path):
    save_folder(random_model(LLAMA), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path).config.tie_word_embeddings
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    ours, theirs = load_model(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not ours.config.tie_word_embeddings and read_config(tmp_path) == ours.config
    assert (logits(theirs) - logits(ours.model)).abs().max() <= 2e-5
    with pytest.raises(SmolseekError, match=r"lm_head\.weight differs"):  # a model whose configuration ties the head
        load_weights(new_model(LLAMA), tmp_path)
    rewrite(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    ours, theirs = load_model(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings and (logits(theirs) - logits(ours.model)).abs().max() <= 2e-5


@pytest.mark.parametrize("keep", [0, 4, 100, 5_000, -1])
def test_truncated_weights_are_named(keep, tmp_path):
    save_folder(random_model(DEEPSEEK), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SmolseekError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(SmolseekError, match=r"holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(DEEPSEEK)))
    with pytest.raises(SmolseekError, match=r"holds no model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SmolseekError, match=r"pytorch_model\.bin is a pickle"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../evil.safetensors"}}')
    with pytest.raises(SmolseekError, match=r"\.\./evil"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SmolseekError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


OLD_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "ep_size": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
OLD_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pretraining_tp": 1,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize("values", [OLD_DEEPSEEK, OLD_LLAMA])
def test_old_style_configs_mean_what_transformers_reads(values):
    ours = config_from_hf(values, "x")
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(values))).to_dict()
    assert theirs["rope_parameters"].pop("type", "yarn") == "yarn"  # the old name is kept next to rope_type
    mine = config_to_hf(ours)
    for name in set(mine) & set(theirs) - {"dtype", "num_nextn_predict_layers"}:
        assert mine[name] == theirs[name], name
    assert config_from_hf(json.loads(json.dumps(theirs)) | {"architectures": values["architectures"]}, "x") == ours


def test_a_missing_original_context_is_the_context():
    scaling = {"type": "yarn", "factor": 4.0}
    rope = config_from_hf(OLD_DEEPSEEK | {"rope_scaling": scaling}, "x").rope_parameters
    assert rope.original_max_position_embeddings == 163_840  # the same value as in transformers
    assert scaling == {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (OLD_LLAMA, {"attention_bias": True}, "attention_bias"),
        (OLD_LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (OLD_LLAMA, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (OLD_LLAMA, {"sliding_window": 4096}, "sliding_window 4096"),
        (OLD_LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        (OLD_LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        (OLD_LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        (OLD_LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (OLD_LLAMA, {"hidden_size": None}, "missing hidden_size"),
        (OLD_LLAMA, {"hidden_size": "64"}, "hidden_size cannot be '64'"),
        (OLD_LLAMA, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "qwen2.*Qwen2.*deepseek_v3"),
        (OLD_LLAMA, {"model_type": None}, "model_type None"),
        (OLD_LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (OLD_LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (OLD_DEEPSEEK, {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (OLD_DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        (OLD_DEEPSEEK, {"topk_method": "greedy"}, "topk_method 'greedy'"),
        (OLD_DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        (OLD_DEEPSEEK, {"kv_lora_rank": None}, "kv_lora_rank None"),
        (OLD_DEEPSEEK, {"rope_scaling": {"type": "su"}}, "rope_type 'su'"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(base, change, message):
    with pytest.raises(SmolseekError, match=message) as caught:
        config_from_hf(base | change, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (SEED, {"model_type": "deepseek_v3"}),
        (SEED, {"model_type": "llama"}),
        (DEEPSEEK, {"kv_lora_rank": None}),
        (DEEPSEEK, {"model_type": "llama"}),
        (LLAMA, {"attention_bias": True}),
    ],
)
def test_models_without_a_format_are_refused(config, change):
    with pytest.raises(SmolseekError, match="use model_type smolseek_gqa_moe"):
        replace(config, **change)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("deepsek-159m", "did you mean deepseek_159m"),
        ("deepseek-159m", "is a preset"),
        ("no/such/folder", "does not exist"),
        ("./none", "does not exist"),
    ],
)
def test_names_that_are_no_model(target, message):
    with pytest.raises(SmolseekError, match=message) as caught:
        load_model(target)
    assert "\n" not in str(caught.value) and "a run folder" in str(caught.value)


def test_a_head_of_float8_beside_another_type_is_read(tmp_path):
    save_folder(random_model(LLAMA), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {"lm_head.weight": head}, file)
    assert not read_config(tmp_path).tie_word_embeddings


def test_a_type_is_torch_s_or_its_name_and_checked_first(tmp_path):
    save_folder(random_model(LLAMA), tmp_path)
    assert load_model(tmp_path, dtype=torch.bfloat16).model.lm_head.weight.dtype == torch.bfloat16
    for wrong in ("int8", torch.int8, None):
        with pytest.raises(SmolseekError, match=r"dtype (int8|None) is not supported"):
            load_model("no/such/model", dtype=wrong)


def test_hub_names(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnet")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(SmolseekError, match="owner/name is not a folder here, and the hub cannot be reached"):
        load_model("owner/name")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    save_folder(random_model(LLAMA), tmp_path)
    assert load_model("owner/name").path == tmp_path
    assert asked["name"] == "owner/name"
    assert not any("bin" in pattern or "py" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


def test_unknown_dtypes_are_refused(tmp_path):
    save_folder(random_model(LLAMA), tmp_path)
    for name in ("int8", "Tensor", "nonsense"):
        with pytest.raises(SmolseekError, match=f"dtype {name}"):
            load_model(tmp_path, dtype=name)
