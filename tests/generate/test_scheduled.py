"""One request of a scheduler: a stream that is not read to its end leaves the scheduler usable."""

import gc
from dataclasses import replace

import pytest

from smolseek.errors import SmolseekError
from smolseek.generate.request import Request
from smolseek.generate.sampling import SamplingParams
from smolseek.generate.scheduled import ScheduledSequence
from smolseek.generate.scheduler import Scheduler
from smolseek.model.transformer import new_model
from smolseek.presets import tiny

REQUEST = Request(prompt=(5, 6, 7), sampling=SamplingParams(temperature=0), max_tokens=6, stop_ids=frozenset())


@pytest.fixture
def scheduler():
    gc.disable()  # the scheduler must not wait for the garbage collector
    yield Scheduler(new_model(replace(tiny(), vocab_size=120, num_hidden_layers=1), seed=1).eval(), cache_tokens=512)
    gc.enable()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("read", [0, 1, 6])
def test_a_sequence_that_is_not_read_to_its_end_frees_the_scheduler(scheduler, read, cancelled):
    expected = [token.id for token in ScheduledSequence(scheduler, REQUEST)]
    sequence = ScheduledSequence(scheduler, REQUEST)
    assert [next(sequence).id for _ in range(read)] == expected[:read]
    if cancelled:
        sequence.cancel()
    del sequence
    assert scheduler.idle and scheduler.stats.cache_tokens_used == 0
    assert [token.id for token in ScheduledSequence(scheduler, REQUEST)] == expected


def test_a_step_that_fails_frees_the_scheduler(scheduler, monkeypatch):
    sequence = ScheduledSequence(scheduler, REQUEST)
    next(sequence)
    with monkeypatch.context() as patched:
        patched.setattr(scheduler, "_write", lambda _sequences: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(sequence)
    assert scheduler.idle and len(list(ScheduledSequence(scheduler, REQUEST))) == 6


def test_the_stop_reasons(scheduler):
    for end, reason in ((None, "length"), ("cancel", "cancelled"), ("stop", "stop_string")):
        sequence = ScheduledSequence(scheduler, REQUEST)
        next(sequence)
        if end == "cancel":
            sequence.cancel()
        if end == "stop":
            sequence.stop(0)
        assert len(list(sequence)) == (5 if end is None else 0)
        assert sequence.results[0].stop_reason == reason
    last = ScheduledSequence(scheduler, REQUEST)
    for _ in range(6):
        next(last)
    last.stop(0)  # the stop string is in the last token
    assert list(last) == [] and last.results[0].stop_reason == "stop_string"


def test_one_sequence_at_a_time(scheduler):
    first, second = (ScheduledSequence(scheduler, REQUEST) for _ in range(2))
    next(first)
    with pytest.raises(SmolseekError, match="the scheduler has another request"):
        next(second)
    assert len(list(first)) == 5
