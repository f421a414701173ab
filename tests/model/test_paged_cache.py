"""The paged cache: reference counts, and the forward pass on pages in any order."""

from dataclasses import replace

import pytest
import torch
from small_models import MLA

from smolseek.model.cache import Cache
from smolseek.model.paged_cache import PagedCache, PagedView
from smolseek.model.transformer import new_model


def test_a_page_is_free_when_its_last_reference_is_released():
    cache = PagedCache(MLA, 4, dtype=torch.float32)
    pages = cache.allocate(3)
    cache.share(pages[:2])
    cache.release(pages)
    assert cache.free == 2 and sorted(cache.allocate(2)) == sorted({0, 1, 2, 3} - set(pages[:2]))
    cache.release(pages[:2])
    assert cache.free == 2 and [cache.references[page] for page in pages[:2]] == [0, 0]
    with pytest.raises(AssertionError):
        cache.allocate(3)
    with pytest.raises(AssertionError):
        cache.release(pages[:1])


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_the_forward_pass_has_the_bits_of_a_contiguous_cache(attention, llama_config):
    config = MLA if attention == "mla" else llama_config(vocab_size=300)
    config = replace(config, max_position_embeddings=300)
    model = new_model(config, seed=3).eval()
    lengths, tables = (150, 64, 1), (torch.tensor([5, 0, 2]), torch.tensor([3, 8]), torch.tensor([1]))
    cache = Cache(config, 3, 200, dtype=torch.float32)
    paged = PagedCache(config, 10, dtype=torch.float32)
    for layer in paged.layers:
        layer.fill_(torch.nan)  # what other sequences may have left
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, (length, table) in enumerate(zip(lengths, tables, strict=True)):
            ids_1T = torch.randint(300, (1, length), generator=generator)
            contiguous = cache.entry(number)
            for chunk in ids_1T.split(128, dim=1):
                view = PagedView(paged, [table], [contiguous.length], chunk.shape[1])
                assert torch.equal(model(chunk, contiguous), model(chunk, view))
                assert view.length == contiguous.length
        for step in range(3):
            now = [length + step for length in lengths]
            ids_B1 = torch.randint(300, (3, 1), generator=generator)
            cache.set_lengths(now)
            assert torch.equal(model(ids_B1, cache), model(ids_B1, PagedView(paged, tables, now)))
    untouched = set(range(10)) - {page for table in tables for page in table.tolist()}
    assert all(bool(layer[page].isnan().all()) for layer in paged.layers for page in untouched)
