"""What is chosen by what a device can do. Stand-in capabilities take the place of GPUs that this machine lacks."""

import itertools
from dataclasses import replace

import pytest
import torch

from smolseek.audit import probe
from smolseek.cli import main
from smolseek.config import OptimConfig
from smolseek.device import Capability, capability, cuda_capability, select
from smolseek.errors import SmolseekError
from smolseek.generate.engine import Decoder
from smolseek.generate.sampling import Sampler, SamplingParams
from smolseek.model.transformer import new_model
from smolseek.presets import preset
from smolseek.storage import saver
from smolseek.train.balance import Balancer, maxvio
from smolseek.train.device import autocast
from smolseek.train.forward_backward import ForwardBackward
from smolseek.train.loss import losses
from smolseek.train.optim import make_optimizer, orthogonalize

CPU = torch.device("cpu")
T4, A100, H100, APPLE = (
    cuda_capability((7, 5), False),
    cuda_capability((8, 0), True),
    cuda_capability((9, 0), True),
    (Capability(float64=False, batches=True)),
)


@pytest.mark.parametrize(
    ("can", "precision"),
    [
        (T4, "float16"),
        (cuda_capability((7, 0), False), "float16"),  # V100
        (cuda_capability((6, 1), False), "float32"),  # GTX 10
        (A100, "bfloat16"),
        (APPLE, "float32"),
        (Capability(), "float32"),  # a CPU without bfloat16
    ],
)
def test_auto_takes_float16_where_there_is_no_bfloat16(can, precision, stand_in):
    stand_in("cpu", can)
    assert can.precision("auto") == precision and can.precision("float16") == "float16"
    with autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == (precision != "float32")
        assert precision == "float32" or torch.get_autocast_dtype("cpu") == getattr(torch, precision)


def test_a_graph_is_captured_only_if_the_experts_do_not_wait_for_the_host():
    half = torch.float16
    assert H100.captures(torch.bfloat16, True) and not H100.captures(half, True) and H100.captures(half, False)
    assert not A100.captures(torch.bfloat16, True) and T4.captures(half, False) and not APPLE.captures(half, False)


def test_this_machine_is_asked_once_for_each_device(monkeypatch):
    first = capability(CPU)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: 1 / 0)
    assert capability(CPU) is first and first.float64 and not first.triton and not first.grouped


def test_devices_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select("auto") == select("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(SmolseekError, match=f"--device {name} needs .*: use --device cpu"):
            select(name)
    assert main(["generate", "smollm2", "a", "--device", "mps"]) == 2
    assert "--device mps needs an Apple GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select("mps") == torch.device("mps") and select("auto") == CPU


def test_on_an_apple_gpu_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "tiny", "--device", "mps", "--run", "unused"]) == 2
    assert "--device mps trains with one process" in capsys.readouterr().err


def test_only_pinned_memory_is_copied_while_the_host_goes_on(stand_in, monkeypatch):
    """A copy from another device would otherwise be saved before it is complete."""
    real, flags = torch.Tensor.copy_, []
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda x, y, non_blocking=False: flags.append(non_blocking) or real(x, y)
    )
    stand_in("cpu", APPLE)
    assert torch.equal(saver._copied(torch.arange(3), None), torch.arange(3)) and flags == [False]


def test_loads_are_the_same_without_float64(stand_in):
    load, biases = torch.tensor([[3, 5, 0, 8], [4, 4, 4, 4]]), []
    for can in (Capability(), APPLE):
        stand_in("cpu", can)
        model = new_model(replace(preset("tiny"), vocab_size=512))
        balancer = Balancer(model, 0.1)
        balancer.routers = balancer.routers[:2]
        for router in balancer.routers:
            router.e_score_correction_bias = torch.zeros(4)
        balancer.add(load)
        assert torch.equal(balancer.step(), maxvio(load))
        biases.append([router.e_score_correction_bias for router in balancer.routers])
    assert all(map(torch.equal, *biases)) and biases[0][0].tolist() == pytest.approx([0.1, -0.1, 0.1, -0.1])


def test_the_audit_copies_in_float64_where_there_is_float64(stand_in):
    model = new_model(replace(preset("tiny"), vocab_size=512))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for can in (Capability(), APPLE):
        stand_in("cpu", can)
        copy = probe.precise_copy(model, ids)
        assert copy is not None and {p.dtype for p in copy.parameters()} == {torch.float64}
        assert probe.rounding_noise(copy, ids, 1e-7) > 0
    moved = []

    class OnGpu:
        device = torch.device("mps")

        def cpu(self):
            moved.append(self)

    probe.with_float64(OnGpu())
    assert len(moved) == 1


def test_sampling_and_decoding_go_without_float64_and_graphs(stand_in):
    model, tokens = new_model(replace(preset("tiny"), vocab_size=512)).eval(), []
    for can in (Capability(), APPLE):
        stand_in("cpu", can)
        decoder = Decoder(model, 1, 8)
        assert decoder.static is None
        logits = decoder.prefill(0, [1, 2, 3])[-1]
        sampler = Sampler(SamplingParams(temperature=1e-9, seed=3), [1], [])
        tokens.append(sampler.sample(logits))
    assert tokens[0] == tokens[1]
    stand_in("cpu", T4)
    assert Decoder(model, 1, 8).static is not None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e12])
def test_muon_in_float16_is_as_near_to_orthogonal_as_in_bfloat16(stand_in, scale):
    g = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0)) * scale
    g[1] = 0
    values = []
    for can in (T4, A100):
        stand_in("cpu", can)
        x = orthogonalize(g)
        assert x.dtype == (torch.float16 if can is T4 else torch.bfloat16) and not x[1].any()
        values.append(torch.linalg.svdvals(x[0].float()))
    assert (values[0] - values[1]).abs().max() < 0.05 and 0.5 < values[0].min() < values[0].max() < 1.5


@pytest.mark.parametrize("can", [T4, A100, H100, APPLE, Capability()], ids=["T4", "A100", "H100", "Apple", "CPU"])
def test_two_steps_on_every_kind_of_device_stay_near_float32(can, stand_in):
    """The choices of the device, without its kernels: precision, experts, Muon, load."""
    ended = []
    for chosen, precision in ((can, "auto"), (Capability(), "float32")):
        stand_in("cpu", chosen)
        model = new_model(replace(preset("tiny"), vocab_size=512), seed=2)
        optimizer = make_optimizer(model, OptimConfig(kind="muon"))
        forward_backward = ForwardBackward(model, losses, autocast(precision, CPU))
        forward_backward._to_device = lambda sequences: sequences  # pinning memory takes a GPU
        balancer, step_losses = Balancer(model, 1e-3), []
        for seed in range(2):
            ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(seed))
            out = forward_backward(ids)
            balancer.add(out.load_LE)
            optimizer.step()
            optimizer.zero_grad()
            balancer.step()
            step_losses.append(float(out.total))
        ended.append(step_losses)
    assert ended[0] == pytest.approx(ended[1], rel=2e-3)
    assert all(a > 0 for a in itertools.chain(*ended))
