"""Model folders as people publish them: smolseek reads each like stock transformers, or refuses it in one line.

Each row of the two tables changes a plain folder. A folder of the first table has the same prompt ids, weights, end
tokens and greedy text as in transformers. A folder of the second table is refused before any work.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smolseek import load
from smolseek.storage.hf_folder import load_model, read_config
from smolseek.storage.weights import file_views

PROMPT = "The old river runs"
SENTENCES = [f"The old river number {i} runs under a small red house near the light." for i in range(100)]
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
TOKENS = 8
END = "<|im_end|>"


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        special_tokens=["<|endoftext|>", "<s>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, because with tiny models threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder: a random Llama with a byte-level tokenizer that adds no tokens."""
    folder = tmp_path_factory.mktemp("folders") / "plain"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token=END).save_pretrained(folder)
    return folder


Change = Callable[[Path], Any]


def rewrite(name: str, change: Callable[[Any], Any]) -> Change:
    """Change a JSON file: `change` receives the old content and returns the new content."""

    def apply(folder: Path) -> None:
        file = folder / name
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(change(values)), encoding="utf-8")

    return apply


def config(**values: Any) -> Change:
    """Set keys of config.json. The value None means null, and `...` removes the key."""
    return rewrite("config.json", lambda old: {k: v for k, v in (old | values).items() if v is not ...})


def generation(**values: Any) -> Change:
    return rewrite("generation_config.json", lambda _: values)


def ends_at(place: int, file: str = "generation_config.json", **others: Any) -> Change:
    """Make the token that the model generates at `place` another end token."""

    def apply(folder: Path) -> None:
        ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(folder)
        written = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=2)
        token = int(written[0, ids.input_ids.shape[1] + place])
        rewrite(file, lambda old: old | {"eos_token_id": [0, token]} | others)(folder)

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the tensors of the folder in place."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    return apply


def cast(kind: torch.dtype, *parts: str) -> Change:
    """Store the tensors whose names contain one of `parts`, or all tensors, in another number format."""
    return weights(lambda t: t.update({n: x.to(kind) for n, x in t.items() if not parts or any(p in n for p in parts)}))


def shape(**values: Any) -> Change:
    """Replace the model by another random model."""

    def apply(folder: Path) -> None:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE | values)).save_pretrained(folder)

    return apply


def without(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def tokenizer(change: Callable[[Tokenizer], Any], **options: Any) -> Change:
    def apply(folder: Path) -> None:
        backend = byte_level()
        change(backend)
        options.setdefault("eos_token", END)
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options).save_pretrained(folder)

    return apply


def adds(template: str) -> Change:
    """Make the tokenizer add special tokens to a text."""
    special = [("<s>", 1), (END, 2)]
    return tokenizer(
        lambda t: setattr(t, "post_processor", processors.TemplateProcessing(single=template, special_tokens=special))
    )


def vocabulary_files(settings: dict[str, Any] | None) -> Change:
    """Store the tokenizer as vocab.json and merges.txt."""

    def apply(folder: Path) -> None:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        without("tokenizer.json", "tokenizer_config.json")(folder)
        text("vocab.json", json.dumps(model["vocab"]))(folder)
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        text("merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")(folder)
        if settings is not None:
            text("tokenizer_config.json", json.dumps(settings))(folder)

    return apply


def sharded(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def twice_in_shards(folder: Path) -> None:
    """Store different embeddings in two shards, of which the last file is used."""
    sharded(folder)
    last = max(folder.glob("model-*.safetensors"))
    tensors = load_file(last)
    save_file(tensors | {"model.embed_tokens.weight": torch.randn(400, 32)}, last, {"format": "pt"})


def beside_an_index(folder: Path) -> None:
    """Add the shards of another model, which model.safetensors overrides."""
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shape(rms_norm_eps=1e-3)(folder)
    sharded(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def tied(head: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if head == "none":
            del tensors["lm_head.weight"]
        elif head == "equal":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        elif head == "alone":
            del tensors["model.embed_tokens.weight"]

    return lambda folder: (weights(change)(folder), config(tie_word_embeddings=True)(folder))


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": END}

SAME: dict[str, list[Change]] = {
    "plain": [],
    "no generation_config.json": [without("generation_config.json")],
    "more end tokens in generation_config.json": [ends_at(3)],
    "a longer text than the first end token allows": [ends_at(0, min_new_tokens=4)],
    "another end token in generation_config.json": [generation(eos_token_id=2)],
    "generation_config.json without end tokens": [generation(bos_token_id=1)],
    "end tokens in config.json alone": [ends_at(2, "config.json"), without("generation_config.json")],
    "no end token at all": [config(eos_token_id=...), without("generation_config.json")],
    "sampling settings": [generation(eos_token_id=2, do_sample=True, temperature=0.6, top_p=0.9, top_k=0)],
    "repetition penalty": [generation(eos_token_id=2, repetition_penalty=1.5)],
    "bans": [generation(no_repeat_ngram_size=2, suppress_tokens=[5, 300], bad_words_ids=[[7], [301, 302]])],
    "penalty in config.json": [config(repetition_penalty=1.5), without("generation_config.json")],
    "harmless settings": [generation(eos_token_id=2, num_beams=1, guidance_scale=None, max_length=30, min_length=0)],
    "BOS": [adds("<s> $A"), ends_at(5)],
    "BOS and EOS": [adds(f"<s> $A {END}")],
    "vocab.json and merges.txt": [vocabulary_files(GPT2)],
    "vocab.json and merges.txt with BOS": [vocabulary_files(GPT2 | {"add_bos_token": True})],
    "tokenizer.json alone": [without("tokenizer_config.json")],
    "added tokens": [tokenizer(lambda t: t.add_tokens([AddedToken("<think>"), AddedToken(" river")]))],
    "more tokens than the model": [tokenizer(lambda t: t.add_tokens([f"<extra {i}>" for i in range(20)]))],
    "a tokenizer that cuts and pads": [tokenizer(lambda t: (t.enable_truncation(2), t.enable_padding(length=9)))],
    "left padding": [tokenizer(lambda t: None, pad_token=END, padding_side="left"), config(pad_token_id=2)],
    "shards": [sharded],
    "a tensor in two shards": [twice_in_shards],
    "shards beside one file": [beside_an_index],
    "a copy of the original weights": [lambda f: shutil.copy(f / "model.safetensors", f / "consolidated.safetensors")],
    "frequencies among the tensors": [
        weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    ],
    "bfloat16": [cast(torch.bfloat16), config(dtype="bfloat16")],
    "float32 head in a bfloat16 model": [cast(torch.bfloat16, "model."), config(dtype="bfloat16")],
    "bfloat16 embedding in a float32 model": [cast(torch.bfloat16, "embed")],
    "float32 norms in a float16 model": [cast(torch.float16, "proj", "embed", "head"), config(dtype="float16")],
    "float16 norms in a bfloat16 model": [
        cast(torch.bfloat16, "proj", "embed", "head"),
        cast(torch.float16, "norm"),
        config(dtype="bfloat16"),
    ],
    "a head of another format than the embedding it is tied to": [
        tied("equal"),
        cast(torch.bfloat16, "embed"),
        config(dtype="bfloat16"),
    ],
    "torch_dtype": [config(dtype=..., torch_dtype="bfloat16")],
    "dtype and torch_dtype": [config(dtype="bfloat16", torch_dtype="float16")],
    "no number format named": [cast(torch.bfloat16), config(dtype=...)],
    "tied": [tied("none")],
    "tied, with the head": [tied("equal")],
    "tied, with the head alone": [tied("alone")],
    "tied, with another head": [tied("other"), ends_at(4)],
    "rope_theta": [config(rope_parameters=..., rope_theta=500.0)],
    "rope_scaling": [config(rope_parameters=..., rope_theta=500.0, rope_scaling=LINEAR)],
    "llama3": [config(rope_parameters=LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 16})],
    "llama3, original context left out": [config(rope_parameters=..., rope_scaling=LLAMA3)],
    "llama3, original context outside": [
        config(
            rope_scaling=LLAMA3 | {"original_max_position_embeddings": 32},
            original_max_position_embeddings=16,
        )
    ],
    "wide heads": [shape(head_dim=16)],
    "one key head": [shape(num_key_value_heads=1)],
    "key heads left out": [shape(num_key_value_heads=None), config(num_key_value_heads=...)],
    "LLaMAForCausalLM": [config(architectures=["LLaMAForCausalLM"])],
    "YiForCausalLM": [config(architectures=["YiForCausalLM"])],
    "no architectures": [config(architectures=...)],
    "MistralForCausalLM without window": [config(**MISTRAL, sliding_window=None)],
    "MistralForCausalLM, window as wide as the context": [config(**MISTRAL, sliding_window=64)],
    "MistralForCausalLM, key heads left out": [
        shape(num_key_value_heads=8, num_attention_heads=8),
        config(**MISTRAL, num_key_value_heads=..., head_dim=..., sliding_window=None),
    ],
    "keys of other programs": [config(pretraining_tp=2, auto_map={"AutoModel": "x.Y"}, _name_or_path="/gone", foo=1)],
}

REFUSED: dict[str, tuple[list[Change], str]] = {
    "MistralForCausalLM with a window": ([config(**MISTRAL, sliding_window=16)], "sliding_window 16 with a context"),
    "MistralForCausalLM, window left out": (
        [config(**MISTRAL, sliding_window=..., max_position_embeddings=...)],
        "sliding_window 4096 with a context of 131072",
    ),
    "model_type Yi": ([config(model_type="Yi", architectures=["YiForCausalLM"])], "model_type 'Yi'"),
    "attention_bias": ([config(attention_bias=True)], "attention_bias"),
    "mlp_bias": ([config(mlp_bias=True)], "mlp_bias"),
    "biases in the files": ([weights(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}))], "bias"),
    "dynamic rope": ([config(rope_scaling={"type": "dynamic", "factor": 2.0})], "rope_type 'dynamic'"),
    "partial rotary": ([config(partial_rotary_factor=0.5)], "partial_rotary_factor"),
    "quantised": ([config(quantization_config={"quant_method": "gptq"})], "quantization_config"),
    "int8": ([cast(torch.int8, "up_proj")], "stored as int8"),
    "number format unknown": ([config(dtype="fp8")], "dtype 'fp8'"),
    "number format no name": ([config(dtype={"text": "float32"})], "dtype {'text': 'float32'}"),
    "adapter": ([text("adapter_config.json", "{}")], "adapter"),
    "original weights alone": (
        [lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors")],
        "holds no model.safetensors",
    ),
    "pickle": ([lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")], "pickle"),
    "head left out": ([weights(lambda t: t.pop("lm_head.weight"))], "lm_head.weight"),
    "layer left out": ([weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))], "up_proj.weight"),
    "shard left out": (
        [sharded, lambda f: max(f.glob("model-*.safetensors")).unlink()],
        "which is listed in model.safetensors.index.json",
    ),
    "settings of a tokenizer alone": ([without("tokenizer.json")], "has no tokenizer"),
    "vocab.json alone": ([vocabulary_files(GPT2), without("merges.txt")], "has no tokenizer"),
    "vocab.json and merges.txt of no class": ([vocabulary_files(None)], "cannot be loaded"),
    "a tokenizer.model that is none": (
        [without("tokenizer.json"), text("tokenizer.model", "none")],
        "cannot be loaded",
    ),
    "damaged tokenizer.json": ([text("tokenizer.json", "{")], "cannot be loaded"),
    "damaged generation_config.json": ([text("generation_config.json", "{")], "generation_config.json cannot be read"),
    "generation_config.json, a list": ([text("generation_config.json", "[]")], "is not a JSON object"),
    "end token beyond the vocabulary": (
        [generation(eos_token_id=[0, 4000])],
        "eos_token_id 4000 is not among the model's",
    ),
    "end token no number": ([generation(eos_token_id="</s>")], "eos_token_id '</s>' is not among the model's"),
    "forced end": ([generation(forced_eos_token_id=2)], "forced_eos_token_id 2 is not supported"),
    "beams": ([generation(num_beams=4)], "num_beams 4 is not supported"),
    "a temperature that is none": ([generation(do_sample=True, temperature="warm")], "temperature cannot be 'warm'"),
    "a ban that is none": ([generation(suppress_tokens=["x"])], "values that are not token ids"),
    "a ban that is no list": ([generation(suppress_tokens=5)], "values that are not token ids"),
    "config.json, no model_type": ([config(model_type=...)], "model_type None"),
}


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.mark.parametrize("name", SAME)
def test_a_folder_means_what_transformers_takes_it_to_mean(name: str, folder: Path) -> None:
    for change in SAME[name]:
        change(folder)
    stock, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = stock(PROMPT).input_ids

    loaded = load_model(folder, dtype="auto")
    weights = file_views(loaded.model) | {"lm_head.weight": loaded.model.lm_head.weight}
    for tensor_name, tensor in theirs.state_dict().items():
        assert weights[tensor_name].dtype == tensor.dtype and torch.equal(weights[tensor_name], tensor), tensor_name
    assert read_config(folder) == loaded.config

    ours = load(str(folder), dtype="float32")
    ends = theirs.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    assert ours.tokens(PROMPT) == ids and ours.stop_ids() == sorted(ends)
    theirs.float()
    prompt = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": TOKENS}
    written = theirs.generate(prompt, **options, pad_token_id=2)[0, len(ids) :].tolist()
    text = stock.decode(next((written[:i] for i, t in enumerate(written) if t in ends), written))
    assert ours.generate(PROMPT, temperature=0.0, max_tokens=TOKENS)[0].text == text
    assert "".join(load(str(folder)).stream(PROMPT, max_tokens=2)) is not None  # in the number format of `auto`


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_read_otherwise_is_refused_in_one_line(name: str, folder: Path, run_cli: Callable[..., Any]) -> None:
    changes, message = REFUSED[name]
    for change in changes:
        change(folder)
    code, out, err = run_cli("generate", folder, PROMPT)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
