"""Continuous batching: a request has the same bits whatever runs beside it, and gives its pages back."""

import time
from dataclasses import replace

import pytest
import torch
from small_models import quantized

from smolseek.errors import SmolseekError
from smolseek.generate.engine import Generator
from smolseek.generate.request import Finished, NewToken, QueueFull, Request
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.scheduler import Scheduler
from smolseek.model.transformer import CausalLM, new_model
from smolseek.presets import preset

GREEDY = SamplingParams(temperature=0)
LENGTHS = (3, 200, 128, 70, 257, 129, 1, 300)
SAMPLINGS = (
    GREEDY,
    SamplingParams(seed=4),
    SamplingParams(seed=5, top_p=0.9),
    GREEDY,
    SamplingParams(temperature=0, repetition_penalty=1.2),
    SamplingParams(seed=6, prefix=(7, 8)),
    GREEDY,
    SamplingParams(seed=7, top_k=5),
)


def shape(name: str):
    """Sizes that the C kernels for prompts support, except for the experts without gates of seed_159m."""
    config = replace(preset(name), vocab_size=120, num_hidden_layers=2, max_position_embeddings=400)
    if name == "tiny":
        heads = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 96}
        config = replace(config, first_k_dense_replace=1, q_lora_rank=64, **heads)
    if name == "seed_159m":
        config = replace(config, hidden_size=64, moe_intermediate_size=96, head_dim=8)
    if name == "smollm2_135m":
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
        config = replace(config, hidden_size=192, intermediate_size=160, **heads)
    return replace(config, initializer_range=0.15)


def small(name: str) -> CausalLM:
    return new_model(shape(name), seed=3).eval()


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(120, (length,), generator=torch.Generator().manual_seed(number)).tolist())


def request(ids: tuple[int, ...], sampling: SamplingParams = GREEDY, most: int | None = 12, **options) -> Request:
    return Request(
        prompt=ids, sampling=sampling, max_tokens=most, stop_ids=options.pop("stop_ids", frozenset()), **options
    )


REQUESTS = [
    request(prompt(n, length), sampling, 4 + n, top_logprobs=2)
    for n, (length, sampling) in enumerate(zip(LENGTHS, SAMPLINGS, strict=True))
]


def assert_pages_are_returned(scheduler: Scheduler) -> None:
    """Every page is free, or is in the prefix cache with a single reference."""
    assert (scheduler.stats.running, scheduler.stats.cache_tokens_used) == (0, 0)
    cache, prefixes = scheduler._cache, scheduler._prefixes
    cached = [page for node in prefixes._unused for page in node.pages]
    assert len(set(cached)) == len(cached) == prefixes.unused_pages == cache.pages - cache.free
    assert all(cache.references[page] == int(page in cached) for page in range(cache.pages))


def run(scheduler: Scheduler, arrivals: dict[int, list[Request]]) -> dict[Request, tuple[list, Finished]]:
    """Submit requests before the numbered steps, and return the tokens and the end of each."""
    numbers: dict[int, Request] = {}
    tokens: dict[int, list] = {}
    ends: dict[int, Finished] = {}
    step = 0
    while step <= max(arrivals) or not scheduler.idle:
        for one in arrivals.get(step, ()):
            number = scheduler.submit(one)
            numbers[number], tokens[number] = one, []
        for event in scheduler.step():
            if isinstance(event, NewToken):
                assert event.sequence not in ends
                tokens[event.sequence].append(event[1:])
            else:
                ends[event.sequence] = event
        step += 1
        assert step < 1000
    assert set(ends) == set(numbers)
    assert_pages_are_returned(scheduler)
    return {one: (tokens[number], ends[number][1:]) for number, one in numbers.items()}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("number_format", ["float32", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_a_request_has_the_same_bits_alone_and_beside_others(name, number_format, backend, use_backend):
    use_backend(backend)
    model = small(name)
    if number_format == "bfloat16":
        model = model.bfloat16()
    elif number_format == "q8_0":
        model = quantized(model, number_format, torch.bfloat16)
    beside = run(
        Scheduler(model, cache_tokens=4096), {0: REQUESTS[:2], 1: REQUESTS[2:3], 6: REQUESTS[3:7], 9: REQUESTS[7:]}
    )
    assert len(beside) == 8
    for one in REQUESTS:
        assert run(Scheduler(model, cache_tokens=4096), {0: [one]})[one] == beside[one]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("number_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_a_prompt_that_begins_as_another_has_the_same_bits(name, number_format, backend, use_backend):
    use_backend(backend)
    model = small(name).to(getattr(torch, number_format))
    text, other = prompt(0, 390), prompt(1, 390)
    prompts = {
        text[:200]: 0,  # the first chunk is remembered; the second one has only 72 tokens
        text[:300]: 128,
        text[:200] + other[:100]: 128,
        text[:260] + other[:100]: 256,
        text[:256]: 128,  # the logits after the last token are computed anew
        other[:256]: 0,
        text[:384]: 256,
        text[:129]: 128,
        text[:385]: 384,
        other[:390]: 256,
    }
    scheduler = Scheduler(model, cache_tokens=4096)
    for ids, cached in prompts.items():
        one = request(ids, top_logprobs=2, most=5)
        tokens, end = run(scheduler, {0: [one]})[one]
        expected = run(Scheduler(model, cache_tokens=4096), {0: [one]})[one]
        assert tokens == expected[0] and end == (*expected[1][:2], cached, *expected[1][3:])


def test_the_next_turn_of_a_chat_reads_only_what_is_new():
    model = small("tiny")
    scheduler = Scheduler(model, cache_tokens=4096)
    first = request(prompt(0, 150), most=80)
    answer = [token[0] for token in run(scheduler, {0: [first]})[first][0]]
    second = request((*first.prompt, *answer, *prompt(1, 40)), most=70)
    tokens, end = run(scheduler, {0: [second]})[second]
    assert end[2] == 192  # of 150 + 79 cached tokens, in full pages
    result = Generator(model, [second.prompt], GREEDY, 70).finish()[0]
    assert [token[0] for token in tokens] == result.tokens
    assert run(scheduler, {0: [second]})[second][1][2] == 256  # again: a multiple of the chunk size
    third = request((*second.prompt, *result.tokens, *prompt(2, 6)), most=5)
    tokens, end = run(scheduler, {0: [third]})[third]
    assert end[2] == 320  # of 270 + 69
    assert [token[0] for token in tokens] == Generator(model, [third.prompt], GREEDY, 5).finish()[0].tokens


def test_equal_beginnings_are_shared_by_requests_that_run_at_the_same_time():
    scheduler = Scheduler(small("tiny"), cache_tokens=512)
    # Alone, each would need 5 of the 8 pages.
    requests = [request((*prompt(0, 256), n), SamplingParams(seed=n), most=20) for n in range(4)]
    numbers = [scheduler.submit(one) for one in requests]
    events = [event for _ in range(6) for event in scheduler.step()]
    assert {event.sequence for event in events} == set(numbers) and scheduler.stats.running == 4
    assert scheduler.stats.cached_tokens == 3 * 256


@pytest.mark.parametrize("name", ["tiny", "smollm2_135m"])
def test_many_requests_in_a_small_cache(name):
    """Requests with shared beginnings, of which some are cancelled, have the same text as alone."""
    model, random = small(name), torch.Generator().manual_seed(5)

    def number(most: int) -> int:
        return int(torch.randint(most, (1,), generator=random))

    texts, scheduler = [prompt(n, 390) for n in range(3)], Scheduler(model, cache_tokens=1024, max_sequences=5)
    requests, answers, cancelled = {}, {}, set()
    for step in range(400):
        if step < 300 and number(4) == 0:
            ids = texts[number(3)][: 1 + number(340)] + tuple(prompt(number(4), 1 + number(30)))
            one = request(ids, SamplingParams(seed=step, temperature=number(2)), most=1 + number(20))
            requests[scheduler.submit(one)] = one
        if number(30) == 0 and requests:
            cancelled.add(max(requests))
            scheduler.cancel(max(requests))
        for event in scheduler.step():
            if isinstance(event, NewToken):
                answers.setdefault(event.sequence, []).append(event[1:])
    assert scheduler.idle and len(requests) > 50 and len(cancelled) > 3 and scheduler.stats.cached_tokens > 2000
    assert_pages_are_returned(scheduler)
    for sequence, one in requests.items():
        tokens = answers.get(sequence, [])
        expected = run(Scheduler(model, cache_tokens=512), {0: [one]})[one][0]
        assert tokens == (expected[: len(tokens)] if sequence in cancelled else expected)


@pytest.mark.parametrize("name", ["tiny", "seed_159m", "smollm2_135m"])
def test_the_text_is_that_of_the_generator(name):
    model = small(name)
    for one, (tokens, end) in run(Scheduler(model, cache_tokens=4096), {0: REQUESTS}).items():
        result = Generator(model, [one.prompt], one.sampling, one.max_tokens).finish()[0]
        assert [token[0] for token in tokens] == result.tokens and end[0] == result.stop_reason
        assert [token[1] for token in tokens] == pytest.approx(result.logprobs, abs=1e-4)


def test_every_end():
    model = small("tiny")
    scheduler = Scheduler(model, cache_tokens=2048)
    full = Generator(model, [prompt(0, 390)], GREEDY).finish()[0].tokens
    stop = frozenset(full[3:4])
    requests = [
        request(prompt(0, 390), most=None),
        request(prompt(0, 390), most=4),
        request(prompt(0, 390), stop_ids=stop),
        request(prompt(0, 390), deadline=time.monotonic()),
    ]
    answers = run(scheduler, {0: requests})
    expected = [("context", full), ("length", full[:4]), ("stop_token", full[: full.index(full[3])]), ("time", [])]
    for one, (reason, ids) in zip(requests, expected, strict=True):
        tokens, (*end, cached, completion_tokens, error, _, _) = answers[one]
        assert ([token[0] for token in tokens], end, completion_tokens, error) == (ids, [reason, 390], len(ids), None)
        assert cached == (384 if reason in ("length", "stop_token") else 0)


def test_a_cancelled_sequence_ends_at_once_in_every_state():
    scheduler = Scheduler(small("tiny"), cache_tokens=2048)
    writing, reading, waiting = (scheduler.submit(request(prompt(n, n), most=100)) for n in (3, 300, 5))
    (token,) = scheduler.step()
    assert token.sequence == writing
    scheduler.step()
    assert (scheduler.stats.running, scheduler.stats.waiting) == (2, 1)
    for number, reason in ((writing, "stop_string"), (reading, "cancelled"), (waiting, "cancelled"), (99, "cancelled")):
        scheduler.cancel(number, reason)
    assert scheduler.stats.cache_tokens_used == 0 and not scheduler.idle
    ends = scheduler.step()
    assert [(e.sequence, e.reason, e.completion_tokens) for e in ends] == [
        (writing, "stop_string", 2),
        (reading, "cancelled", 0),
        (waiting, "cancelled", 0),
    ]
    assert scheduler.idle
    assert_pages_are_returned(scheduler)


def test_a_full_queue_and_requests_that_cannot_be_met():
    scheduler = Scheduler(small("tiny"), cache_tokens=256, max_queue=2)
    for _ in range(2):
        scheduler.submit(request(prompt(0, 9)))
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        scheduler.submit(request(prompt(0, 9)))
    for wrong, message in (
        (request(prompt(0, 200), most=None), "holds 256: lower max_tokens"),
        (request(()), "prompt is empty"),
        (request((120,)), "token id 120"),
        (request((1,), most=0), "max_tokens 0 must be 1 or more"),
        (request(prompt(0, 400)), "400 tokens, but the model's context is 400"),
    ):
        with pytest.raises(SmolseekError, match=message):
            scheduler.submit(wrong)
    with pytest.raises(SmolseekError, match="chunk 100 is no multiple of 64"):
        Scheduler(small("tiny"), chunk=100)
    with pytest.raises(SmolseekError, match="max_sequences 0 must be 1 or more"):
        Scheduler(small("tiny"), max_sequences=0)
    with pytest.raises(SmolseekError, match="max_sequences 513 must be at most 512"):
        Scheduler(small("tiny"), max_sequences=513)


def test_requests_wait_for_pages_and_for_their_turn():
    model = small("tiny")
    scheduler = Scheduler(model, cache_tokens=256, max_sequences=2)
    requests = [request(prompt(n, length), most=20) for n, length in enumerate((200, 100, 3, 100))]
    answers = run(scheduler, {0: requests})
    for one in requests:
        assert run(Scheduler(model), {0: [one]})[one] == answers[one]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_that_are_not_finite_end_only_their_sequence(backend, use_backend):
    use_backend(backend)
    model = new_model(replace(shape("tiny"), tie_word_embeddings=False), seed=3)
    good = request(tuple(i for i in prompt(0, 20) if i != 5), most=8)
    expected = run(Scheduler(model), {0: [good]})[good]
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    bad = [request((1, 5)), request((1, 2, 3), SamplingParams(temperature=0, prefix=(7, 5)))]
    scheduler = Scheduler(model, cache_tokens=256)
    answers = run(scheduler, {0: [good, *bad]})
    assert answers[good] == expected == run(scheduler, {0: [good]})[good]
    assert [answers[one][1][0] for one in bad] == ["error", "error"] and len(answers[bad[1]][0]) == 2
    assert "logits are not finite" in answers[bad[0]][1][4]


def test_an_error_in_sampling_ends_only_its_sequence(capfd):
    def broken(ids_1T, scores_1V):
        return scores_1V[:, :0]

    model = small("tiny")
    good, nothing = request(prompt(1, 20)), request(prompt(2, 20), SamplingParams(min_tokens=1), stop_ids=range(120))
    bad = request(prompt(3, 20), SamplingParams(processors=(broken,)))
    answers = run(Scheduler(model, cache_tokens=512), {0: [good, bad, nothing]})
    assert answers[good] == run(Scheduler(model), {0: [good]})[good]
    assert answers[bad][1][0] == "error" and "sampling has failed" in answers[bad][1][4]
    assert answers[nothing][1][0] == "error" and "no token is left" in answers[nothing][1][4]
    assert capfd.readouterr().err.count("Traceback") == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_experts_and_log_probabilities_of_the_prompt(backend, use_backend):
    use_backend(backend)
    model = small("tiny")
    plain = request(prompt(1, 140), most=5)
    detailed = replace(plain, routing=True, prompt_logprobs=True, top_logprobs=3)
    beside = request(prompt(2, 20), most=9)
    answers = run(Scheduler(model), {0: [beside, detailed, plain]})
    (first, *others), _ = answers[detailed]
    assert [token[:2] for token in answers[detailed][0]] == [token[:2] for token in answers[plain][0]]
    assert answers[plain][0][0][3:] == (None, None, None) == answers[beside][0][0][3:]
    ids = [*plain.prompt, *(token[0] for token in answers[plain][0])]
    outputs = []
    model.routers[0].register_forward_hook(lambda _module, _inputs, routing: outputs.append(routing.experts_NK))
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    expected = [((*sorted(one),),) for one in outputs[0].tolist()]
    *_, experts, prompt_experts, prompt_logprobs = first
    assert list(prompt_experts) == expected[:140] and experts == expected[139]
    assert [token[3] for token in others] == expected[140:-1]
    assert len(prompt_logprobs) == 139
    for at, (logprob, top) in enumerate(prompt_logprobs):
        assert logprob == pytest.approx(float(logp_TV[at, ids[at + 1]]), abs=1e-4)
        assert [token for token, _ in top] == logp_TV[at].topk(3).indices.tolist()
