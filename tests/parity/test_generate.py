"""smolseek and transformers' `generate` give the same tokens from the same folder, in float32."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor

from smolseek.generate.beam import beam_search
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import preset
from smolseek.storage.hf_folder import load_model, save_folder

STOPS = (0, 7)


def small(name: str):
    """Return a small configuration for each kind of attention and feed-forward layer."""
    mla = replace(preset("tiny"), vocab_size=211, num_hidden_layers=3, max_position_embeddings=256, eos_token_id=STOPS)
    if name == "mla":
        # Large weights give sharp distributions, so that no two tokens have almost equal probability.
        return replace(mla, initializer_range=0.2, first_k_dense_replace=1)
    if name == "mla_groups":
        extra = {"q_lora_rank": 40, "n_group": 4, "topk_group": 2, "attention_bias": True, "v_head_dim": 24}
        return replace(mla, initializer_range=0.15, routed_scaling_factor=2.5, n_shared_experts=2, **extra)
    llama = replace(preset("smollm2_135m"), vocab_size=211, hidden_size=90, num_hidden_layers=3, intermediate_size=200)
    return replace(llama, max_position_embeddings=256, initializer_range=0.3, eos_token_id=STOPS)


@pytest.fixture(scope="module", params=["mla", "mla_groups", "llama"])
def pair(request, tmp_path_factory):
    """The same folder opened by smolseek and by transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    config = small(request.param)
    model = new_model(config, seed=5)
    if config.n_routed_experts:
        for router in model.routers:
            router.e_score_correction_bias.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    save_folder(model, folder)
    return load_model(str(folder)).model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_of(n: int, seed: int = 4) -> list[int]:
    return torch.randint(8, 211, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def theirs(oracle, ids: list[int], max_tokens: int, **options) -> list[list[int]]:
    """Return transformers' continuations, without the stop token and the padding after it."""
    out = oracle.generate(
        torch.tensor([ids]), max_new_tokens=max_tokens, eos_token_id=list(STOPS), pad_token_id=0, **options
    )
    rows = [row[len(ids) :].tolist() for row in out]
    return [row[: next((i for i, t in enumerate(row) if t in STOPS), len(row))] for row in rows]


def ours(model: CausalLM, ids: list[int], max_tokens: int, **options) -> list[int]:
    sampling = SamplingParams(temperature=0, **options)
    return Generator(model, [ids], sampling, max_tokens, stop_ids=STOPS).finish()[0].tokens


class Shift(LogitsProcessor):
    """A user's logits processor, which favours token ids shortly after the last token id."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        nearest = (input_ids[:, -1:] + torch.arange(1, 4)) % scores.shape[1]
        return scores.scatter_add(1, nearest, torch.full(nearest.shape, 3.0))


GREEDY = {
    "plain": ({}, {}),
    "repetition": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "ngram": ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    "bad words": ({"bad_words": ((11,), (12, 13), (90,))}, {"bad_words_ids": [[11], [12, 13], [90]]}),
    "min tokens": ({"min_tokens": 12}, {"min_new_tokens": 12}),
    "own": ({"processors": (Shift(),)}, {"logits_processor": [Shift()]}),
    "all": (
        {"repetition_penalty": 1.2, "no_repeat_ngram": 3, "min_tokens": 5, "bad_words": ((5,),)},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "bad_words_ids": [[5]]},
    ),
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_writes_what_transformers_writes(pair, case, use_backend):
    model, oracle = pair
    our_options, their_options = GREEDY[case]
    for n in (1, 70):
        ids = prompt_of(n)
        expected = theirs(oracle, ids, 16, do_sample=False, **their_options)[0]
        for backend in ("cpu", "reference"):
            use_backend(backend)
            assert ours(model, ids, 16, **our_options) == expected


BEAMS = [
    {"beams": 2},
    {"beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"beams": 4, "length_penalty": 2.0, "early_stopping": True, "returned": 4},
    {"beams": 5, "length_penalty": -1.0, "returned": 2},
    {"beams": 6, "length_penalty": 0.5, "early_stopping": True, "returned": 6},
    {"beams": 7, "length_penalty": 1.0, "early_stopping": "never", "returned": 2},
    {"beams": 8, "length_penalty": 1.5, "early_stopping": "never", "returned": 3},
    {"beams": 4, "ngram": 2, "returned": 4},
]


@pytest.mark.parametrize("case", BEAMS, ids=str)
def test_beam_search_finds_what_transformers_finds(pair, case):
    model, oracle = pair
    options = {"beams": 4, "length_penalty": 1.0, "early_stopping": False, "returned": 1, "ngram": 0, **case}
    for ids in (prompt_of(6), prompt_of(20)):
        expected = theirs(
            oracle,
            ids,
            10,
            do_sample=False,
            num_beams=options["beams"],
            length_penalty=options["length_penalty"],
            early_stopping=options["early_stopping"],
            num_return_sequences=options["returned"],
            no_repeat_ngram_size=options["ngram"],
        )
        hypotheses = beam_search(
            model,
            ids,
            beams=options["beams"],
            max_tokens=10,
            sampling=SamplingParams(no_repeat_ngram=options["ngram"]),
            stop_ids=STOPS,
            length_penalty=options["length_penalty"],
            early_stopping=options["early_stopping"],
            returned=options["returned"],
        )
        assert [result.tokens for result in hypotheses] == expected
