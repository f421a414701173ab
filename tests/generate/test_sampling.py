"""Samples follow the distribution of transformers' logits warpers, and invalid parameters are refused."""

import pytest
import torch
from transformers.generation import logits_process as hf

from smolseek.errors import SmolseekError
from smolseek.generate.sampling import Sampler, SamplingParams, candidates

DRAWS = 20_000
LOGITS = torch.randn(80, generator=torch.Generator().manual_seed(1)) * 2


def expected(sampling: SamplingParams, logits_V: torch.Tensor) -> torch.Tensor:
    """Return the probabilities [V] that transformers' warpers compute in their order."""
    chain = [hf.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        chain.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p:
        chain.append(hf.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(hf.MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p:
        chain.append(hf.TypicalLogitsWarper(sampling.typical_p))
    scores = logits_V[None].clone()
    for warper in chain:
        scores = warper(torch.tensor([[0]]), scores)
    return scores[0].softmax(dim=-1)


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_k=12),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=0.9, top_k=30, top_p=0.7),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(temperature=1.0, typical_p=0.6),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.95, min_p=0.02, typical_p=0.9),
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_draws_follow_the_distribution_of_transformers(sampling):
    p_V = expected(sampling, LOGITS)
    logits_C, ids_C = candidates(LOGITS, sampling)
    ours_V = torch.zeros(80).scatter(0, ids_C, logits_C.softmax(dim=-1))
    torch.testing.assert_close(ours_V, p_V, rtol=1e-5, atol=1e-7)
    sampler = Sampler(sampling, [0], ())
    drawn = torch.tensor([sampler.sample(LOGITS) for _ in range(DRAWS)]).bincount(minlength=80).double()
    assert drawn[p_V == 0].sum() == 0
    frequent = p_V * DRAWS >= 5
    wanted = p_V.double()[frequent] * DRAWS
    seen = drawn[frequent]
    others = DRAWS - wanted.sum()
    chi = float(((seen - wanted) ** 2 / wanted).sum())
    chi += float((DRAWS - seen.sum() - others) ** 2 / others) if others > 5 else 0.0
    degrees = max(int(frequent.sum()) - (0 if others > 5 else 1), 1)
    # Wilson and Hilferty's normal approximation: 4 standard deviations are one chance in 30,000.
    z = ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert z < 4


def test_a_nucleus_wider_than_the_first_candidates_is_complete():
    logits_V = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 0.1
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    assert len(candidates(logits_V, sampling)[1]) == int((expected(sampling, logits_V) > 0).sum()) > 1024


def test_presence_and_frequency_count_what_was_written():
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5), [3], ())
    for token in (1, 1, 2):
        sampler.ids.append(token)
    logits_V = torch.tensor([0.0, 2.1, 1.4, 0.0])
    # Token 1: 2.1 - 1 - 2 * 0.5 = 0.1. Token 2: 1.4 - 1 - 0.5 = -0.1. Token 3 is in the prompt and keeps its 0.
    assert sampler.sample(logits_V) == 1
    sampler.ids.append(1)
    assert sampler.sample(logits_V) in (0, 3)


def test_a_seed_gives_the_same_draws():
    first, again, other = (Sampler(SamplingParams(seed=seed), [0], ()) for seed in (7, 7, 8))
    draws = [[sampler.sample(LOGITS) for _ in range(30)] for sampler in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "filters",
    [{"temperature": 0.0}, {"temperature": 1e-5}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.5}, {"top_k": 3}],
    ids=str,
)
def test_options_that_forbid_every_token_are_refused_whatever_the_filters(filters):
    sampler = Sampler(SamplingParams(min_tokens=2, **filters), [3], range(80))
    with pytest.raises(SmolseekError, match="no token is left"):
        sampler.sample(LOGITS)
    allowed = Sampler(SamplingParams(min_tokens=2, **filters), [3], range(1, 80))
    assert allowed.sample(LOGITS) == 0


def test_a_huge_temperature_draws_no_banned_token():
    sampler = Sampler(SamplingParams(temperature=1e30, bad_words=((5,),)), [3], ())
    assert 5 not in {sampler.sample(LOGITS) for _ in range(1000)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature nan is not finite"),
        ({"temperature": 1e39}, "temperature 1e\\+39 must be at most 1e\\+30"),
        ({"top_k": 0}, "top_k 0 must be 1 or more"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ({"top_p": 1.1}, "top_p 1.1 must be at most 1"),
        ({"typical_p": 2.0}, "typical_p 2.0 must be at most 1"),
        ({"min_p": -1.0}, "min_p -1.0 must be 0 or more"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be 1e-30 or more"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram -1 must be 0 or more"),
        ({"bad_words": ((),)}, "bad words has an empty entry"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(options, message):
    with pytest.raises(SmolseekError, match=message):
        SamplingParams(**options)
