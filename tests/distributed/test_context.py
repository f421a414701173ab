"""Several processes compute the same losses, norms and weights as one process, also after loading a checkpoint."""

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from old_folders import make_old_checkpoint

from smolseek.config import MeshConfig, OptimConfig, TrainConfig
from smolseek.distributed.context import DistributedContext
from smolseek.distributed.mesh import choose
from smolseek.distributed.single_process import SingleProcess
from smolseek.model.transformer import zero_outputs
from smolseek.presets import preset
from smolseek.run_folder import RunFolder
from smolseek.storage.checkpoint import load_state
from smolseek.storage.hf_folder import load_weights
from smolseek.storage.manifest import verify
from smolseek.storage.safetensors_file import INDEX, SafetensorsFiles
from smolseek.storage.saver import Saver
from smolseek.train.balance import Balancer
from smolseek.train.device import autocast
from smolseek.train.evaluate import evaluate
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.guard import Guard
from smolseek.train.loss import losses
from smolseek.train.loss_scale import FIRST, LossScale
from smolseek.train.optim import make_optimizer
from smolseek.train.state import TrainState

MODEL = replace(
    preset("tiny"),
    vocab_size=64,
    num_hidden_layers=2,
    hidden_size=32,
    moe_intermediate_size=16,
    first_k_dense_replace=0,
)
CPU = torch.device("cpu")
CONFIG = TrainConfig(model=MODEL, run="unused", batch_size=4, grad_accum=2, seq_len=16)


class RandomSequences:
    """A stream of random sequences, whose position can be saved."""

    def __init__(self):
        self.at = 0

    def next_batch(self, n, stopped=None):
        self.at += 1
        return torch.randint(64, (n, 17), generator=torch.Generator().manual_seed(self.at))

    def position(self):
        return {"tokens": self.at}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def train(distributed: SingleProcess, run: RunFolder, steps: int, kind: str, resume: int = 0) -> dict:
    """Train for `steps` steps, from the checkpoint `resume` if it is given, save, and return the measurements."""
    model = distributed.build_model(MODEL, 3, torch.device("cpu"))
    trained = distributed.optimizer_parameters(model)
    optimizer = make_optimizer(model, OptimConfig(kind=kind, lr=1e-3), trained)
    balancer = Balancer(model, 0.01)
    stream = distributed.share_stream(RandomSequences() if distributed.is_main else None)
    state = TrainState(model, optimizer, balancer, stream, Guard(CONFIG.guard), distributed)
    if resume:
        state.restore(run.checkpoint_path(resume), data=True)
    step_losses, norms, load = [], [], []
    for _ in range(steps):
        total = torch.zeros(())
        shape = (CONFIG.batch_size, CONFIG.grad_accum, CONFIG.seq_len)
        for number, (sequences, share) in enumerate(distributed.micro_batches(stream, *shape), 1):
            distributed.set_last_backward(model, number == CONFIG.grad_accum)
            out = losses(model, sequences, alpha=1e-2)
            (out.total * share / CONFIG.grad_accum).backward()
            total += out.next_token * share
            balancer.add(out.load_LE)
        norms.append(float(distributed.clip_grad_norm(model, 0.5)))
        step_losses.append(float(distributed.all_reduce(total)) / CONFIG.grad_accum)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        load.append(balancer.step(1.0, distributed.all_reduce).tolist())
        state.progress.step += 1
    sequences = torch.randint(64, (7, 17), generator=torch.Generator().manual_seed(0))
    record = evaluate(model, sequences, 100, 3, torch.autocast("cpu", enabled=False), distributed=distributed)
    with Saver(run, model, None, distributed, timeout=60.0) as saver:
        saver.save(state.progress.step, *state.capture(0.0))
    assert saver.failure is None
    parameters = sum(p.numel() for _, p in trained)
    return {"losses": step_losses, "norms": norms, "maxvio": load, "val": record, "parameters": parameters}


def train_float16(distributed: SingleProcess, steps: int) -> dict:
    """Train in float16. In step 2, the gradients of the last process overflow, and all processes must skip the step."""
    model, overflows = distributed.build_model(MODEL, 3, CPU), False

    def objective(*arguments, **options):
        out = losses(*arguments, **options)
        return out._replace(total=out.total * math.inf) if overflows else out

    optimizer = make_optimizer(model, OptimConfig(kind="adamw"), distributed.optimizer_parameters(model))
    loss_scale, context = LossScale(CPU), autocast("float16", CPU)
    forward_backward = ForwardBackward(
        model, objective, context, grad_accum=2, accumulate=distributed.accumulates, scale=loss_scale.tensor
    )
    stream = distributed.share_stream(RandomSequences() if distributed.is_main else None)
    step_losses, norms = [], []
    for step in range(1, steps + 1):
        overflows = step == 2 and distributed.rank == distributed.size - 1
        total = torch.zeros(())
        for number, (sequences, share) in enumerate(distributed.micro_batches(stream, 4, 2, 16), 1):
            distributed.set_last_backward(model, number == 2)
            total += forward_backward(sequences, share).next_token * share
        norm = float(distributed.clip_grad_norm(model, 0.5, loss_scale.value))
        step_losses.append(float(distributed.all_reduce(total)) / 2)
        if loss_scale.is_overflow(step_losses[-1], norm):
            loss_scale.lower(step)
        else:
            norms.append(norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"losses": step_losses, "norms": norms, "scale": loss_scale.value}


def start_from_zero(distributed: SingleProcess) -> dict:
    """Set the outputs to zero, as a new run does, then draw all weights again; return the norms of local shards."""
    model = distributed.build_model(MODEL, 3, CPU)
    zero_outputs(model)
    norms = {name: float(shard.tensor.norm()) for name, shard in distributed.local_shards(model).items()}
    optimizer = make_optimizer(model, OptimConfig(kind="adamw"), distributed.optimizer_parameters(model))
    stream = distributed.share_stream(RandomSequences() if distributed.is_main else None)
    state = TrainState(model, optimizer, Balancer(model, 0.01), stream, Guard(CONFIG.guard), distributed)
    state.reset(4, None, False)
    drawn = {name: float(shard.tensor.norm()) for name, shard in distributed.local_shards(model).items()}
    state.reset(3, None, True)
    again = {name: float(shard.tensor.norm()) for name, shard in distributed.local_shards(model).items()}
    return {"norms": norms, "drawn": drawn, "again": again}


def work(rank: int, size: int, port: int, mesh: MeshConfig, folder: str, steps: int, kind: str, resume: int) -> None:
    """Train in one of several processes, and write the results to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        SingleProcess()
        if size == 1
        else DistributedContext(choose(mesh, MODEL, size), torch.device("cpu"), 60.0) as distributed
    ):
        if kind == "zero":
            results = start_from_zero(distributed)
        elif kind == "float16":
            results = train_float16(distributed, steps)
        else:
            results = train(distributed, RunFolder(folder, writes=distributed.is_main), steps, kind, resume)
        results["timeouts"] = timeouts(distributed)
    (Path(folder) / f"results-{rank}.json").write_text(json.dumps(results))


def timeouts(distributed: SingleProcess) -> list[float]:
    """Return the timeout of collectives in seconds, for each process group."""
    if not isinstance(distributed, DistributedContext):
        return []
    meshes = [mesh for mesh in distributed.meshes if mesh is not None]
    groups = [None, *(group for mesh in meshes for group in mesh.get_all_groups())]
    backends = [(group or dist.group.WORLD)._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def run_processes(size: int, folder: Path, steps: int, resume: int = 0, kind: str = "adamw", **mesh: int) -> list[dict]:
    """Train with `size` processes, and return the results of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    arguments = (size, port, MeshConfig(**mesh), str(folder), steps, kind, resume)
    # Fork, because importing takes each process several seconds. So this process must not have used autograd before.
    mp.start_processes(work, arguments, nprocs=size, start_method="fork")
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The results of four steps with one process."""
    folder = tmp_path_factory.mktemp("single")
    return RunFolder(folder), run_processes(1, folder, 4)[0]


def check_same(results, expected, first=0):
    for name in ("losses", "maxvio"):
        for ours, theirs in zip(results[name], expected[name][first:], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9), name
    assert results["norms"] == pytest.approx(expected["norms"][first:], rel=1e-4)
    assert results["val"]["val_loss"] == pytest.approx(expected["val"]["val_loss"], rel=1e-5)
    assert results["val"]["val_load"] == expected["val"]["val_load"]


def check_checkpoint(run, other, step):
    path, expected = run.checkpoint_path(step), other.checkpoint_path(step)
    assert verify(path) is None
    weight_files = sorted(path.glob("*.safetensors"))
    if len(weight_files) > 1:
        index = json.loads((path / INDEX).read_text())["weight_map"]
        assert index == {name: file.name for file in weight_files for name in SafetensorsFiles([file])}
        assert "lm_head.weight" in index  # tied, and written for other engines
    models = []
    for folder in (path, expected):
        models.append(SingleProcess().build_model(MODEL, 0, torch.device("cpu")))
        load_weights(models[-1], folder)
    for name, theirs in models[1].state_dict().items():
        assert torch.allclose(models[0].state_dict()[name], theirs, atol=2e-5), name
    ours, theirs = load_state(path), load_state(expected)
    assert ours[1]["data"] == theirs[1]["data"] and sorted(ours[0]) == sorted(theirs[0])
    assert all(torch.allclose(ours[0][name], theirs[0][name], atol=1e-5) for name in theirs[0])


@pytest.mark.parametrize(
    ("size", "mesh", "share"),
    [
        (3, {}, 1.0),
        (2, {"shard": 2}, 0.5),
        (2, {"expert": 2}, None),
        (4, {"shard": 2}, 0.5),
        (4, {"data": 2, "expert": 2, "shard": 4}, 0.25),
    ],
)
def test_many_processes_step_as_one(size, mesh, share, single, tmp_path):
    run, expected = single
    results = run_processes(size, tmp_path / "run", 4, **mesh)
    for each in results:
        check_same(each, expected)
        assert set(each["timeouts"]) == {60.0}
    if share is not None:
        assert max(each["parameters"] for each in results) <= 1.1 * share * expected["parameters"]
    check_checkpoint(RunFolder(tmp_path / "run"), run, 4)


def test_saved_by_four_it_goes_on_with_two_and_then_with_one(single, tmp_path):
    run, expected = single
    folder = tmp_path / "run"
    first = run_processes(4, folder, 2, data=2, expert=2, shard=4)
    make_old_checkpoint(RunFolder(folder).checkpoint_path(2))
    second = run_processes(2, folder, 1, resume=2, shard=2)
    third = run_processes(1, folder, 1, resume=3)
    assert first[0]["losses"] + second[0]["losses"] + third[0]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    check_checkpoint(RunFolder(folder), run, 4)


def test_muon_steps_whole_matrices_in_every_process(tmp_path):
    expected = run_processes(1, tmp_path / "single", 3, kind="muon")[0]
    for each in run_processes(2, tmp_path / "run", 3, kind="muon", expert=2):
        assert each["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_the_outputs_start_at_zero_in_every_process(tmp_path):
    for each in run_processes(2, tmp_path / "run", 0, kind="zero", shard=2, expert=2):
        assert each["again"] == each["norms"]
        for name, norm in each["norms"].items():
            output = "o_proj" in name or "down_proj" in name
            assert (norm == 0) == (output or name.endswith("bias")), name
            assert (each["drawn"][name] == 0) == name.endswith("bias"), name


def test_in_float16_all_processes_have_one_scale(tmp_path):
    expected = run_processes(1, tmp_path / "single", 4, kind="float16")[0]
    assert expected["scale"] == FIRST / 2
    for each in run_processes(2, tmp_path / "run", 4, kind="float16", shard=2, expert=2):
        assert each["scale"] == FIRST / 2 and len(each["norms"]) == 3
        assert each["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert each["norms"] == pytest.approx(expected["norms"], rel=1e-2)
