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
    request(prompt(n, length), sampling, 6 + 3 * n, top_logprobs=2)
    for n, (length, sampling) in enumerate(zip(LENGTHS, SAMPLINGS, strict=True))
]


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
        Scheduler(model, cache_tokens=4096), {0: REQUESTS[:2], 1: REQUESTS[2:3], 9: REQUESTS[3:7], 14: REQUESTS[7:]}
    )
    assert len(beside) == 8
    for one in REQUESTS:
        assert run(Scheduler(model, cache_tokens=4096), {0: [one]})[one] == beside[one]


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
        tokens, end = answers[one]
        assert ([token[0] for token in tokens], end) == (ids, (reason, 390, 0, len(ids), None))
    assert scheduler.stats.running == 0 and scheduler.stats.cache_tokens_used == 0


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
    assert "logits are not finite" in answers[bad[0]][1][-1]


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
