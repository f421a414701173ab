"""cpu_decode.c with NaN and infinite numbers."""

from dataclasses import replace

import pytest
import torch

from smolseek.generate.cpu_decode import library
from smolseek.generate.engine import Decoder
from smolseek.generate.paged_decoder import PagedDecoder
from smolseek.model.cache import Cache
from smolseek.model.paged_cache import PagedCache
from smolseek.model.transformer import new_model
from smolseek.presets import tiny


@pytest.mark.parametrize("groups", [1, 4])
def test_nan_stays_in_its_sequence_and_in_memory(groups, use_backend):
    """NaN scores still choose distinct experts: 200 sequences with 3 experts each have 600 slots."""
    if library() is None:
        pytest.skip("no C compiler")
    chosen = {"num_experts_per_tok": 3, "n_group": groups, "topk_group": min(2, groups)}
    model = new_model(replace(tiny(), vocab_size=64, num_hidden_layers=2, **chosen), seed=1).eval()
    batch = 200
    tokens = [5 + n % 7 for n in range(batch)]
    good = Decoder(model, batch, 4).step(tokens)
    assert good.isfinite().all()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = torch.nan
    some = [3 if n % 3 == 0 else token for n, token in enumerate(tokens)]
    decoder = Decoder(model, batch, 4)
    assert decoder.cpu is not None
    mixed = decoder.step(some)
    spoilt = torch.tensor([token == 3 for token in some])
    assert mixed[spoilt].isnan().all() and torch.equal(mixed[~spoilt][:, 5:], good[~spoilt][:, 5:])
    assert Decoder(model, batch, 4).step([3] * batch).isnan().all()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = 0.0
        model.model.layers[1].mlp.gate.weight[2] = torch.nan  # only the score of one expert is NaN
    assert Decoder(model, batch, 4).step(tokens).isnan().all()
    use_backend("reference")
    assert Decoder(model, batch, 4).step(tokens).isnan().all()


def test_the_work_memory_has_space_for_the_threads_of_the_step():
    """A step may run as many threads as torch had when the decoder was made."""
    if library() is None:
        pytest.skip("no C compiler")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        cpu = Decoder(new_model(replace(tiny(), vocab_size=64, num_hidden_layers=1), seed=1).eval(), 4, 4).cpu
        torch.set_num_threads(1)
        cpu._reserve(4, 4)
        assert len(cpu._work) >= cpu._work_floats(cpu._model, 4, 4, 3) and max(cpu._threads._seconds) == 3
    finally:
        torch.set_num_threads(threads)


def test_logits_after_a_prompt_are_not_rounded(bf16_products):
    """In bfloat16, numbers near 16 are 0.125 apart, so the likeliest tokens would often have equal logits."""
    model = new_model(replace(tiny(), vocab_size=256, num_hidden_layers=1), seed=1).bfloat16().eval()
    with torch.inference_mode():
        hidden_TD = model.hidden(torch.tensor([[5, 6, 7]]), Cache(model.config, 1, 3, dtype=torch.bfloat16)).hidden_BTD[
            0
        ]
        exact_TV = hidden_TD.double() @ model.lm_head.weight.double().T
    logits_TV = Decoder(model, 1, 3).prefill(0, [5, 6, 7], 3)
    torch.testing.assert_close(logits_TV.double(), exact_TV, rtol=1e-5, atol=1e-5)
    scheduled = PagedDecoder(model, PagedCache(model.config, 1, dtype=torch.bfloat16))
    torch.testing.assert_close(scheduled.read(torch.tensor([0]), 0, [5, 6, 7], logits=True), logits_TV[-1])
