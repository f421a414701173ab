"""The engine: a decode step in C equals the forward pass, a batch equals single sequences, and stop reasons."""

import math
from dataclasses import replace

import pytest
import torch

from smolseek.errors import SmolseekError
from smolseek.generate.beam import beam_search
from smolseek.generate.engine import Decoder, Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.model.transformer import new_model
from smolseek.presets import preset

GREEDY = SamplingParams(temperature=0)


def small(name: str):
    config = replace(preset(name), vocab_size=120, num_hidden_layers=2, max_position_embeddings=200)
    if name == "seed_159m":
        config = replace(config, hidden_size=64, moe_intermediate_size=96, head_dim=8)
    if name == "smollm2_135m":
        config = replace(config, hidden_size=90, intermediate_size=100)
    return replace(config, initializer_range=0.15)


@pytest.fixture(scope="module", params=["tiny", "seed_159m", "smollm2_135m"])
def model(request):
    return new_model(small(request.param), seed=3)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(120, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_decoding_gives_the_logits_of_the_full_forward_pass(model, backend, use_backend):
    use_backend(backend)
    (ids,) = prompts(150)
    decoder = Decoder(model, 1, 150)
    assert (decoder.cpu is not None) == (backend == "cpu")
    with torch.no_grad():
        full_TV = model(torch.tensor([ids]))[0]
    decoded = [decoder.prefill(0, ids[:20])] + [decoder.step([token]) for token in ids[20:]]
    assert float((torch.cat(decoded) - full_TV[19:]).abs().max()) <= 1e-4 * float(full_TV.std())


def test_bfloat16_weights_are_computed_in_float32(model):
    rounded = new_model(model.config, seed=3).to(torch.bfloat16)
    (ids,) = prompts(60)
    with torch.no_grad():
        exact_TV = new_model(model.config).float()
        exact_TV.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
        exact_TV = exact_TV(torch.tensor([ids]))[0]
    decoder = Decoder(rounded, 1, 60)
    if decoder.cpu is None:
        pytest.skip("no C compiler")
    decoder.prefill(0, ids[:1])
    decoded = torch.cat([decoder.step([token]) for token in ids[1:]])
    error = (decoded - exact_TV[1:]).abs().mean(dim=1).median()
    assert float(error) < 0.05 * float(exact_TV.std())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_batch_of_different_lengths_equals_its_single_runs(model, backend, use_backend):
    use_backend(backend)
    batch = prompts(3, 70, 1, 45, 64)
    options = [
        {"temperature": 0},
        {"seed": 4},
        {"seed": 5, "top_p": 0.9},
        {"temperature": 0},
        {"repetition_penalty": 1.2},
    ]
    samplings = [SamplingParams(**option) for option in options]
    batched = Generator(model, batch, samplings, 24, stop_ids=(5,)).finish()
    for ids, sampling, result in zip(batch, samplings, batched, strict=True):
        single = Generator(model, [ids], sampling, 24, stop_ids=(5,)).finish()[0]
        assert (single.tokens, single.stop_reason) == (result.tokens, result.stop_reason)
        if backend == "cpu":
            assert single.logprobs == result.logprobs  # bit for bit
        else:
            assert single.logprobs == pytest.approx(result.logprobs, abs=1e-4)


def test_logprobs_are_those_of_the_model():
    model = new_model(small("tiny"), seed=3)
    (ids,) = prompts(9)
    result = Generator(model, [ids], SamplingParams(temperature=2.0, seed=1), 12).finish()[0]
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids + result.tokens]))[0].log_softmax(dim=-1)
    expected = [float(logp_TV[8 + i, token]) for i, token in enumerate(result.tokens)]
    assert result.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_forced_prefix_comes_first_and_counts():
    model = new_model(small("tiny"), seed=3)
    (ids,) = prompts(9)
    result = Generator(model, [ids], SamplingParams(temperature=0, prefix=(7, 8, 9)), 10).finish()[0]
    after = Generator(model, [[*ids, 7, 8, 9]], GREEDY, 7).finish()[0]
    assert result.tokens == [7, 8, 9, *after.tokens]
    assert len(result.logprobs) == 10 and not any(math.isnan(p) for p in result.logprobs)


def test_every_stop_reason():
    model = new_model(small("tiny"), seed=3)
    (ids,) = prompts(190)
    full = Generator(model, [ids], GREEDY).finish()[0]
    assert (full.stop_reason, len(full.tokens)) == ("context", 10)
    assert Generator(model, [ids], GREEDY, 4).finish()[0].stop_reason == "length"
    stopped = Generator(model, [ids], GREEDY, stop_ids=[full.tokens[3]]).finish()[0]
    assert stopped.stop_reason == "stop_token" and stopped.tokens == full.tokens[: full.tokens.index(full.tokens[3])]
    stopped_at_three = Generator(model, [ids], GREEDY, 3)
    for count, token in enumerate(stopped_at_three, 1):
        if count == 3:
            stopped_at_three.stop(token.sequence)  # counts more than the limit of 3
    assert (stopped_at_three.results[0].stop_reason, stopped_at_three.results[0].tokens) == (
        "stop_string",
        full.tokens[:3],
    )
    assert Generator(model, [ids], GREEDY, max_time=1e-9).finish()[0].stop_reason == "time"
    generator = Generator(model, [ids], GREEDY)
    next(generator)
    generator.cancel()
    assert generator.finish()[0].stop_reason == "cancelled" and len(generator.results[0].tokens) == 1


def test_beams_that_need_more_than_the_vocabulary_still_end():
    model = new_model(small("tiny"), seed=3)
    (ids,) = prompts(195)
    hypotheses = beam_search(model, ids, beams=3, max_tokens=50, returned=3)
    assert [r.stop_reason for r in hypotheses] == ["context"] * 3 and hypotheses[0].score >= hypotheses[
        1
    ].score >= hypotheses[2].score


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 200, {}, "200 tokens, but the model's context is 200"),
        ([120], {}, "token id 120"),
        ([1], {"max_tokens": 0}, "max_tokens 0 must be 1 or more"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_at_once(ids, options, message):
    model = new_model(small("tiny"), seed=3)
    with pytest.raises(SmolseekError, match=message):
        Generator(model, [ids], GREEDY, **options)


def test_beam_search_writes_no_forbidden_token(model):
    def only(*tokens):
        bad_words = tuple((i,) for i in range(model.config.vocab_size) if i not in tokens)
        return beam_search(model, [1], beams=3, max_tokens=4, returned=3, sampling=SamplingParams(bad_words=bad_words))

    assert {token for one in only(7, 9) for token in one.tokens} == {7, 9}
    assert {token for one in only(7) for token in one.tokens} == {7}
    with pytest.raises(SmolseekError, match="no token is left"):
        only()


def test_no_more_continuations_than_beams():
    model = new_model(small("tiny"), seed=3)
    with pytest.raises(SmolseekError, match="n 3 is not between 1 and the number of beams, 2"):
        beam_search(model, [1], beams=2, max_tokens=4, returned=3)
