"""Bad steps are skipped, too many in a row cause a rollback to a checkpoint, and a kill does not change this."""

import builtins
import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from texts import write_words

from smolseek import console
from smolseek.config import DataConfig, GuardConfig, TrainConfig
from smolseek.data.retries import HubUnavailable
from smolseek.data.stream import TrainStream
from smolseek.errors import SmolseekError, Stopped
from smolseek.presets import preset
from smolseek.run_folder import RunFolder
from smolseek.storage import safetensors_file
from smolseek.storage.checkpoint import CheckpointWriter, load_state
from smolseek.storage.manifest import newest_valid
from smolseek.train import audits, loop, setup
from smolseek.train.guard import VAIN_RETURNS, WINDOW, Guard, StopRequest

SEQ, BATCH, ACCUM = 16, 2, 2
STEP_TOKENS = SEQ * BATCH * ACCUM
real_losses = setup.losses


pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "text.jsonl", 60)


def config(run, text, steps=8, **options) -> TrainConfig:
    model = replace(preset("tiny"), num_hidden_layers=1, hidden_size=16, max_position_embeddings=32)
    options = {"save_every": 2, "eval_every": 4, "log_every": 1, "sample_tokens": 0} | options
    sizes = {"seq_len": SEQ, "batch_size": BATCH, "grad_accum": ACCUM, "eval_tokens": 64}
    data = DataConfig(sources=(str(text),), val_fraction=0.2)
    return TrainConfig(model=model, run=str(run), steps=steps, data=data, **sizes, **options)


@pytest.fixture
def plant(monkeypatch):
    """Return a function that multiplies the loss on the data of the given steps by `value`, which is NaN by default.

    Steps are numbered from 0 in the order of the data, and recognised by their sequences. So the numbers are also right
    after a resume or a rollback.
    """

    def plant(bad: set[int], value: float = math.nan) -> None:
        real_next = TrainStream.next_batch

        def next_batch(stream, n, *_):
            number = stream.position()["tokens"] // STEP_TOKENS
            sequences = real_next(stream, n)
            poisoned.update(map(tuple, sequences.tolist()) if number in bad else ())
            return sequences

        def losses(model, sequences, **options):
            out = real_losses(model, sequences, **options)
            if torch.is_grad_enabled() and any(tuple(row) in poisoned for row in sequences.tolist()):
                factor = math.nan if math.isnan(value) else value
                out = out._replace(total=out.total * factor, next_token=out.next_token * factor)
            return out

        poisoned: set[tuple[int, ...]] = set()
        monkeypatch.setattr(TrainStream, "next_batch", next_batch)
        monkeypatch.setattr(setup, "losses", losses)

    return plant


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """A run without bad steps and signals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "audit", lambda *_, **__: [])
        patch.setattr(audits, "audit_model", lambda *_, **__: [])
        torch.set_num_threads(1)
        return loop.train(config(tmp_path_factory.mktemp("whole") / "run", text))


def records(run) -> list[dict]:
    timing = {"tokens_per_second", "memory", "peak_memory"}
    actual = RunFolder(run).read_metrics()
    return [{k: v for k, v in record.items() if k not in timing} for record in actual if "machine" not in record]


def weights(path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def state(path) -> dict:
    return load_state(path)[1]


def test_one_bad_batch_is_skipped_and_named(text, tmp_path, plant):
    plant({3})
    last = loop.train(config(tmp_path / "run", text))
    [skipped] = [r["skipped"] for r in records(tmp_path / "run") if "skipped" in r]
    assert skipped["data"]["tokens"] == 3 * STEP_TOKENS and skipped["tokens"] == STEP_TOKENS
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"Step 4 is skipped: its loss is nan; its data is tokens {3 * STEP_TOKENS:,} to {4 * STEP_TOKENS:,}" in log
    saved = state(last)
    assert saved["progress"]["step"] == 8 and saved["progress"]["tokens"] == 8 * STEP_TOKENS
    assert saved["guard"]["skipped_steps"] == 1 and saved["guard"]["skipped_tokens"] == STEP_TOKENS
    assert saved["data"]["tokens"] == 9 * STEP_TOKENS and saved["guard"]["returns"] == 0
    assert math.isfinite(saved["progress"]["loss"]) and math.isfinite(saved["progress"]["val_loss"])


def test_a_skipped_step_leaves_no_trace_in_the_model(text, tmp_path, plant, monkeypatch):
    """A run that skips data has the same weights as a run that never had these data."""
    plant({1})
    skipping = loop.train(config(tmp_path / "skipping", text, steps=4))
    monkeypatch.undo()
    real_next = TrainStream.next_batch

    def without(stream, n, *_):
        if stream.position()["tokens"] == STEP_TOKENS:
            real_next(stream, n)
        return real_next(stream, n)

    monkeypatch.setattr(TrainStream, "next_batch", without)
    assert weights(skipping) == weights(loop.train(config(tmp_path / "without", text, steps=4)))


def test_after_three_bad_batches_the_run_returns_to_the_checkpoint_and_goes_on_with_later_data(text, tmp_path, plant):
    plant({5, 6, 7})  # after five good steps, with a checkpoint at step 4
    run = tmp_path / "run"
    last = loop.train(config(run, text))
    [returned] = [(r["step"], r["returned"]) for r in records(run) if "returned" in r]
    assert returned[0] == 4 and returned[1]["from"] == 5 and returned[1]["undone_tokens"] == STEP_TOKENS
    assert [d["tokens"] // STEP_TOKENS for d in returned[1]["data"]] == [5, 6, 7]
    log = (run / "train.log").read_text()
    assert "3 bad steps in a row: the run rolls back from step 5 to step-000004" in log and log.count("is skipped") == 3
    saved = state(last)
    assert saved["guard"]["returns"] == 1 and saved["guard"]["skipped_steps"] == 3
    assert saved["progress"]["tokens"] == 8 * STEP_TOKENS and saved["guard"]["skipped_tokens"] == 4 * STEP_TOKENS
    assert saved["data"]["tokens"] == 12 * STEP_TOKENS and math.isfinite(saved["progress"]["loss"])
    # Undone steps have no record in the metrics.
    assert [r["step"] for r in records(run) if "lr" in r] == list(range(1, 9))


@pytest.mark.parametrize("kill_after_skips", [1, 2, 4])
def test_killed_between_bad_batches_it_has_the_same_weights(text, tmp_path, plant, monkeypatch, kill_after_skips):
    """Kill the run after the first or second of three bad batches, or after the rollback that follows the third."""
    plant({5, 6, 7, 10})
    undisturbed = loop.train(config(tmp_path / "whole", text))

    class Killed(BaseException):
        pass

    real, left = Guard.skip, [kill_after_skips]

    def skip(self, *arguments):
        patient = real(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return patient

    run = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "skip", skip)
        with pytest.raises(Killed):
            loop.train(config(run, text))
    killed = loop.train(config(run, text), resume=True)
    assert weights(killed) == weights(undisturbed)
    assert records(run) == records(tmp_path / "whole")
    assert state(killed)["guard"] == state(undisturbed)["guard"]


def test_a_stop_between_bad_batches_keeps_the_count(text, tmp_path, plant, monkeypatch):
    """SIGTERM comes after two of three bad batches. The checkpoint counts two, so the third causes a rollback."""
    plant({5, 6, 7})
    undisturbed = loop.train(config(tmp_path / "whole", text))
    real = Guard.skip

    def skip(self, *arguments):
        patient = real(self, *arguments)
        if len(self.in_a_row) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return patient

    run = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "skip", skip)
        with pytest.raises(Stopped, match="SIGTERM after step 5") as stopped:
            loop.train(config(run, text))
    assert stopped.value.code == 143
    assert len(state(RunFolder(run).checkpoint_path(5))["guard"]["in_a_row"]) == 2
    last = loop.train(config(run, text), resume=True)
    log = (run / "train.log").read_text()
    assert log.count("is skipped") == 3
    # The rollback goes to step 5, where the stopped run saved. The undisturbed run goes back to step 4.
    assert [r["returned"]["from"] for r in records(run) if "returned" in r] == [5]
    assert state(last)["guard"]["skipped_steps"] == state(undisturbed)["guard"]["skipped_steps"] == 3


def test_without_a_checkpoint_it_goes_back_to_the_first_weights(text, tmp_path, plant, monkeypatch):
    plant({1, 2, 3})
    again = loop.train(config(tmp_path / "again", text, steps=2, save_every=4))
    assert "rolls back from step 1 to the first weights" in (tmp_path / "again" / "train.log").read_text()
    assert any(record.get("audit") == "start" for record in records(tmp_path / "again"))
    monkeypatch.undo()
    real_init = TrainStream.__init__

    def further_on(stream, *arguments, **options):
        real_init(stream, *arguments, **options)
        stream.next_batch(4 * BATCH * ACCUM)

    monkeypatch.setattr(TrainStream, "__init__", further_on)
    assert weights(again) == weights(loop.train(config(tmp_path / "later", text, steps=2, save_every=4)))


def test_a_checkpoint_that_leads_nowhere_is_left_for_the_one_before(text, tmp_path, plant):
    plant(set(range(4, 10)))  # three bad steps after step 4, and three more after the rollback to step 4
    run = tmp_path / "run"
    last = loop.train(config(run, text, steps=6))
    assert [r["returned"]["from"] for r in records(run) if "returned" in r] == [4]
    log = (run / "train.log").read_text()
    assert "rolls back from step 4 to step-000004" in log and "rolls back from step 4 to step-000002" in log
    assert state(last)["guard"]["returns"] == 2 and state(last)["progress"]["step"] == 6


def test_it_gives_up_when_going_back_does_not_help(text, tmp_path, plant):
    plant(set(range(4, 100)))
    with pytest.raises(SmolseekError, match=rf"{VAIN_RETURNS} rollbacks .* did not help: .*--optim\.lr"):
        loop.train(config(tmp_path / "run", text))
    path, skipped = newest_valid(RunFolder(tmp_path / "run"))
    assert path is None or not skipped


def test_a_spike_is_skipped_only_with_the_option():
    calm, strict = Guard(GuardConfig()), Guard(GuardConfig(spike=6))
    rng = random.Random(0)
    for step in range(1, WINDOW + 1):
        values = 3 + rng.gauss(0, 0.1), 1 + rng.gauss(0, 0.05)
        for guard in (calm, strict):
            assert guard.judge(*values) is None
            guard.passed(step, *values)
    assert calm.judge(30.0, 1.0) is None and calm.losses == []
    assert "loss is 30" in str(strict.judge(30.0, 1.0)) and "gradient norm is 9" in str(strict.judge(3.0, 9.0))
    assert strict.judge(3.2, 1.1) is None and strict.judge(0.1, 0.1) is None
    for step in range(WINDOW + 1, 3 * WINDOW):  # frozen weights: later gradient norms are not compared with these steps
        strict.passed(step, 3.0, None)
    assert strict.judge(3.2, 1.1) is None and strict.furthest == 3 * WINDOW - 1
    other = Guard(GuardConfig(spike=6))
    other.load_state_dict(json.loads(json.dumps(strict.state_dict())))
    assert other == strict
    for guard in (calm, strict):
        assert "inf" in str(guard.judge(math.inf, 1.0)) and "norm is nan" in str(guard.judge(1.0, math.nan))


def at_step(monkeypatch, step, number):
    """Make the process send itself a signal in the given step."""
    real, left = Guard.judge, [step]

    def judge(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(Guard, "judge", judge)


@pytest.fixture
def default_hangup():
    """Set the default handler of SIGHUP, because the tests may run under nohup, which ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"])
def test_signals_of_batch_systems_and_closed_terminals_save(text, undisturbed, tmp_path, monkeypatch, name):
    number = getattr(signal, name)
    run, handler = tmp_path / "run with a space", signal.getsignal(number)
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    with monkeypatch.context() as patch:
        at_step(patch, 3, number)
        patch.setattr(console, "progress", lambda *_: contextlib.nullcontext(console.Bar(1, "", 1e9, None)))
        with pytest.raises(
            Stopped, match=f"{name} after step 3.*go on with: smolseek train --run '.*a space' --resume"
        ) as stopped:
            loop.train(config(run, text))
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    monkeypatch.undo()
    assert weights(loop.train(config(run, text), resume=True)) == weights(undisturbed)


@pytest.mark.usefixtures("default_hangup")
def test_a_closed_terminal_saves_a_run_that_writes_to_a_file_and_it_goes_on(text, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(console, "on_terminal", lambda: False)
    at_step(monkeypatch, 3, signal.SIGHUP)
    assert weights(loop.train(config(run, text))) == weights(undisturbed)
    assert (RunFolder(run).checkpoint_path(3) / "training" / "manifest.json").exists()
    assert "SIGHUP: step 3 is saved, and the run continues" in (run / "train.log").read_text()


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert stop.received is None and stop.save_request() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_batch_systems_signal_the_first_sigterm_waits_for_the_save():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGUSR1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(text, undisturbed, tmp_path, monkeypatch, number):
    """The signal may also come during an evaluation, which the resumed run repeats."""
    handler = signal.getsignal(number)
    for place, name, calls in (("Guard", "judge", 3), ("loop", "evaluate", 1)):
        run = tmp_path / place
        target = Guard if place == "Guard" else loop
        real, left = getattr(target, name), [calls]

        def counted(*arguments, real=real, left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, counted)
            with pytest.raises(Stopped, match=r"is saved; go on with: .*--resume") as stopped:
                loop.train(config(run, text))
        step = 3 if place == "Guard" else 4
        assert stopped.value.code == 128 + number and f"step {step}," in str(stopped.value)
        assert newest_valid(RunFolder(run)) == (RunFolder(run).checkpoint_path(step), [])
        assert signal.getsignal(number) is handler
        assert weights(loop.train(config(run, text), resume=True)) == weights(undisturbed)
        assert records(run) == records(undisturbed.parents[1])


@pytest.fixture
def python_answers_interrupts():
    """Set Python's handler of SIGINT, because the tests may run in the background, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once(capfd, python_answers_interrupts):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still here")
    assert (
        "SIGINT: the run will finish and save this step; a second SIGINT or SIGTERM stops at once"
        in capfd.readouterr().err
    )


def test_elsewhere_than_in_the_main_thread_no_handlers_are_set():
    actual = []

    def work():
        with StopRequest() as stop:
            actual.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert actual == [None]


def test_unavailable_data_stop_the_run_saved(text, undisturbed, tmp_path, monkeypatch):
    real = TrainStream.next_batch

    def next_batch(stream, n, *_):
        if stream.position()["tokens"] == 5 * STEP_TOKENS:
            raise HubUnavailable("the hub has been away for 10 minutes")
        return real(stream, n)

    run = tmp_path / "away"
    with monkeypatch.context() as patch:
        patch.setattr(TrainStream, "next_batch", next_batch)
        with pytest.raises(Stopped, match="away for 10 minutes; stopped after step 5, which is saved") as stopped:
            loop.train(config(run, text))
    assert stopped.value.code == 75
    assert weights(loop.train(config(run, text), resume=True)) == weights(undisturbed)
    assert records(run) == records(undisturbed.parents[1])


def test_another_batch_size_goes_on_where_the_data_stopped(text, tmp_path):
    with pytest.raises(Stopped):
        stop_at(config(tmp_path / "run", text), 4)
    last = loop.train(replace(config(tmp_path / "run", text), batch_size=3, grad_accum=1), resume=True)
    saved = state(last)
    assert saved["data"]["tokens"] == 4 * STEP_TOKENS + 4 * SEQ * 3 == saved["progress"]["tokens"]


def stop_at(settings: TrainConfig, step: int) -> None:
    real = Guard.passed

    def passed(self, done, *arguments):
        real(self, done, *arguments)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "passed", passed)
        loop.train(settings)


def test_log_and_samples_are_cut_back_with_the_metrics(text, tmp_path):
    run = tmp_path / "run"
    loop.train(config(run, text, sample_tokens=1))
    log, samples = (run / "train.log").read_text(), (run / "samples.md").read_text()
    shutil.rmtree(RunFolder(run).checkpoint_path(8))
    (run / "train.log").open("a").write("a torn li")
    loop.train(config(run, text, sample_tokens=1), resume=True)
    assert (run / "samples.md").read_text() == samples

    def steps(text):
        lines = [line for line in text.splitlines() if line.startswith(("step ", "val ", "Audit"))]
        return [line.rsplit("  ", 1)[0] if line.startswith("step ") else line for line in lines]  # without tokens/s

    again = (run / "train.log").read_text()
    assert steps(again) == steps(log) and again.count("Resuming ") == 1 and "a torn li" not in again


def test_only_the_last_checkpoints_and_every_mth_stay(text, tmp_path):
    run = tmp_path / "run"
    loop.train(config(run, text, steps=9, save_every=1, keep_last=2, keep_every=4))
    names = sorted(p.name for p in RunFolder(run).checkpoints.iterdir())
    assert names == ["step-000004", "step-000008", "step-000009"]


def test_a_disk_that_is_full_for_a_while(text, undisturbed, tmp_path, monkeypatch, capsys):
    """In the middle of the run nothing can be written. The run goes on, and nothing is missing at its end."""
    run = tmp_path / "run"
    real_write, real_open = safetensors_file.write, builtins.open
    full = []

    def write(path, entries):  # fails by name, because the saving thread may still write during the next steps
        real_write(path, entries)
        if path.parent.name.endswith(("step-000004", "step-000006")):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *arguments, **options):
        if full and mode == "ab" and str(path).startswith(str(run)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(path, mode, *arguments, **options)

    real_passed = Guard.passed

    def passed(self, step, *arguments):
        full[:] = [True] if 3 <= step <= 6 else []
        real_passed(self, step, *arguments)

    monkeypatch.setattr(Guard, "passed", passed)
    monkeypatch.setattr(safetensors_file, "write", write)
    monkeypatch.setattr(console, "open", opened, raising=False)
    last = loop.train(config(run, text))
    assert weights(last) == weights(undisturbed)
    assert sorted(p.name for p in RunFolder(run).checkpoints.iterdir()) == ["step-000002", "step-000008"]
    failed = [r["save_failed"] for r in records(run) if "save_failed" in r]
    assert "the checkpoint of step 4 cannot be written" in failed[0] and "No space left" in failed[0]
    assert [r for r in records(run) if "save_failed" not in r] == records(undisturbed.parents[1])
    out, err = capsys.readouterr()
    assert err.count("metrics.jsonl cannot be written") == 1 and err.count("train.log cannot be written") == 1
    assert out.count("Training continues, but the checkpoint of step 4") == 1


def test_a_last_save_that_fails_is_the_outcome(text, tmp_path, monkeypatch):
    real = safetensors_file.write

    def write(path, entries):
        if path.parent.name.endswith("step-000008"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, entries)

    monkeypatch.setattr(safetensors_file, "write", write)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(
        SmolseekError, match=r"checkpoint of step 8 cannot be written .*No space left on device.*--resume"
    ):
        loop.train(config(run.path, text))
    assert newest_valid(run) == (run.checkpoint_path(6), [])
    assert not list(run.checkpoints.glob(".tmp*"))


def test_a_bug_in_the_writing_thread_surfaces(text, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(CheckpointWriter, "finish", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        loop.train(config(tmp_path / "run", text))


def test_the_training_does_not_wait_for_the_disk(text, tmp_path, monkeypatch):
    """Training continues while a checkpoint is written, and the next save waits for it."""
    real, passed = CheckpointWriter.write_shard, Guard.passed
    during, step_done = [], threading.Event()

    def slow(self, *arguments):
        step_done.clear()
        during.append(step_done.wait(60) if self.step < 8 else True)
        real(self, *arguments)

    def count(self, *arguments):
        passed(self, *arguments)
        step_done.set()

    monkeypatch.setattr(CheckpointWriter, "write_shard", slow)
    monkeypatch.setattr(Guard, "passed", count)
    undisturbed = loop.train(config(tmp_path / "run", text))
    assert during == [True] * 4 and newest_valid(RunFolder(tmp_path / "run")) == (undisturbed, [])
