"""Chunks and steps on a paged cache have the bits of a contiguous cache."""

import math
from dataclasses import replace

import pytest
import torch

from smolseek.generate.engine import Decoder
from smolseek.generate.paged_decoder import PagedDecoder, by_token
from smolseek.model.paged_cache import PagedCache
from smolseek.model.transformer import new_model
from smolseek.presets import preset

TABLES = (torch.tensor([5, 0, 2]), torch.tensor([3, 8]), torch.tensor([1]))


def small(name: str, dtype: torch.dtype):
    config = replace(preset(name), vocab_size=120, num_hidden_layers=3, max_position_embeddings=300)
    if name == "tiny":
        config = replace(config, first_k_dense_replace=1)
    if name == "smollm2_135m":
        config = replace(config, hidden_size=90, intermediate_size=100)
    return new_model(replace(config, initializer_range=0.15), seed=3).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
def test_steps_in_c_have_the_bits_of_a_contiguous_cache(name, dtype, use_backend):
    use_backend("cpu")
    model = small(name, dtype)
    cache = PagedCache(model.config, 10, dtype=dtype)
    paged, contiguous = PagedDecoder(model, cache), Decoder(model, 3, 180)
    lengths, generator = [127, 60, 1], torch.Generator().manual_seed(0)
    for number, length in enumerate(lengths):
        ids = torch.randint(120, (length,), generator=generator).tolist()
        logits_V = paged.read(TABLES[number], 0, ids, logits=True)
        assert logits_V is not None and torch.equal(logits_V, contiguous.prefill(number, ids)[0])
    for _ in range(12):  # two of the sequences reach a new page
        tokens = torch.randint(120, (3,), generator=generator).tolist()
        logits_BV, _ = paged.step(TABLES, lengths, tokens)
        assert torch.equal(logits_BV, contiguous.step(tokens))
        lengths = [length + 1 for length in lengths]


@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
def test_experts_of_a_step_are_those_of_the_routers(name, use_backend):
    results = []
    for backend in ("cpu", "reference"):
        use_backend(backend)
        model = small(name, torch.float32)
        decoder = PagedDecoder(model, PagedCache(model.config, 10, dtype=torch.float32))
        details = [decoder.read_details(TABLES[number], 0, range(5, 9 + number)) for number in range(2)]
        _, experts_LBK = decoder.step(TABLES[:2], (4, 5), (7, 8), experts=True)
        results.append((experts_LBK.shape, by_token(experts_LBK), [one.experts for one in details]))
    assert results[0] == results[1]
    (layers, batch, top_k), step, chunks = results[0]
    assert (layers, batch, len(chunks[1])) == (2 if name == "tiny" else 0, 2, 5)
    assert all(len(set(one)) == top_k for token in (*step, *chunks[0]) for one in token)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("vocabulary", [1, 7, 120, 5000])
def test_the_likeliest_token_and_the_logsumexp(backend, vocabulary, use_backend):
    use_backend(backend)
    model = small("tiny", torch.float32)
    decoder = PagedDecoder(model, PagedCache(model.config, 1, dtype=torch.float32))
    logits_BV = 10 * torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0))
    logits_BV[3] = logits_BV[3].round()  # several largest logits
    logits_BV[4] = -torch.inf
    logits_BV[4, vocabulary // 2] = 1.5
    best, total = decoder.summarise(logits_BV)
    assert best == [row.tolist().index(row.max()) for row in logits_BV]
    assert total == pytest.approx(logits_BV.double().logsumexp(dim=-1).tolist(), abs=1e-5, rel=1e-6)
    for number in range(9):
        assert decoder.summarise(logits_BV[number : number + 1]) == ([best[number]], [total[number]])
    logits_BV[0, -1], logits_BV[1, 0] = torch.nan, torch.inf
    assert not any(map(math.isfinite, decoder.summarise(logits_BV)[1][:2]))
