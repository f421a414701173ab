"""The tree of remembered pages: what matches, and what is removed first."""

import pytest
import torch
from small_models import MLA

from smolseek.generate.prefix_cache import PrefixCache
from smolseek.model.paged_cache import PagedCache

CHUNK, PAGE = 128, 64


def tokens(path) -> int:
    return sum(len(node.tokens) for node in path)


def remember(prefixes: PrefixCache, cache: PagedCache, ids: tuple[int, ...], prompt_tokens: int) -> None:
    """Do what a scheduler does with a sequence from its start to its end."""
    path = prefixes.match(ids[:prompt_tokens])
    shared = [page for node in path for page in node.pages]
    cache.share(shared)
    new = -(-len(ids) // PAGE) - len(shared)
    prefixes.evict(new)
    pages = shared + cache.allocate(new)
    for start in range(tokens(path), prompt_tokens, CHUNK):
        end = min(start + CHUNK, prompt_tokens)
        first, last = start // PAGE, -(-end // PAGE)
        chunk = prefixes.insert_chunk(path, ids[start:end], pages[first:last])
        cache.share(chunk)
        cache.release(pages[first:last])
        pages[first:last] = chunk
    prefixes.insert_pages(path, ids, pages, prompt_tokens)
    prefixes.release(path)
    cache.release(pages)


def matched(prefixes: PrefixCache, prompt: tuple[int, ...]) -> int:
    path = prefixes.match(prompt)
    prefixes.release(path)
    return tokens(path)


@pytest.fixture
def cache():
    return PagedCache(MLA, 16, dtype=torch.float32)


def test_a_prompt_continues_after_chunks_and_after_generated_tokens(cache):
    prefixes = PrefixCache(cache, CHUNK)
    text, other = tuple(range(1000)), (0,) * 100
    remember(prefixes, cache, text[:290], prompt_tokens=210)
    assert cache.free == 16 - 4
    assert matched(prefixes, text[:300]) == 256  # two of its pages have generated tokens
    assert matched(prefixes, text[:256] + other) == 256
    assert matched(prefixes, text[:256]) == 128  # one token is left
    assert matched(prefixes, text[:255] + other) == 128  # the page of 192 has no generated token
    assert matched(prefixes, text[:129]) == 128
    assert matched(prefixes, text[:128]) == 0 == matched(prefixes, other)
    remember(prefixes, cache, text[:400] + other, prompt_tokens=400)  # the next turn
    assert cache.free == 16 - 4 - 3
    assert matched(prefixes, text[:400] + other) == 448  # its last full page has generated tokens
    assert matched(prefixes, text[:400]) == 384  # a multiple of the chunk size after generated tokens
    assert matched(prefixes, text[:383]) == 256


def test_the_least_recently_used_pages_are_removed_first(cache):
    prefixes = PrefixCache(cache, CHUNK)
    texts = [tuple(range(n, n + 300)) for n in (0, 1000, 2000)]
    for ids in texts:
        remember(prefixes, cache, ids[:257], prompt_tokens=257)
    assert cache.free == 4 and prefixes.unused_pages == 12
    running = prefixes.match(texts[0])  # in use, and so not removed
    assert matched(prefixes, texts[1]) == 256  # used later than the third text
    prefixes.evict(6)
    assert [matched(prefixes, ids) for ids in texts] == [256, 256, 128]
    prefixes.evict(12)
    assert [matched(prefixes, ids) for ids in texts] == [256, 0, 0]
    prefixes.release(running)
    prefixes.evict(16)
    assert cache.free == 16 and prefixes.unused_pages == 0 and not any(cache.references)


def test_sequences_that_end_alike_are_remembered_once(cache):
    prefixes = PrefixCache(cache, CHUNK)
    for _ in range(3):
        remember(prefixes, cache, tuple(range(300)), prompt_tokens=140)
    assert cache.free == 16 - 4 and prefixes.unused_pages == 4
    assert matched(prefixes, tuple(range(300))) == 256
