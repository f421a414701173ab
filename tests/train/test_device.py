"""The GPU that each process uses, and errors if there is none."""

import pytest
import torch

from smolseek.cli import main
from smolseek.device import Capability
from smolseek.errors import SmolseekError
from smolseek.train.device import choose_device


@pytest.fixture
def four_gpus(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return taken


def under_torchrun(monkeypatch, local, on_machine, processes):
    for name, n in {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": on_machine, "WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, str(n))


def test_each_process_of_a_machine_takes_another_gpu(four_gpus, monkeypatch):
    assert choose_device("auto") == torch.device("cuda")
    assert not four_gpus
    under_torchrun(monkeypatch, 3, 4, 8)
    assert choose_device("auto") == torch.device("cuda", 3) and four_gpus == [torch.device("cuda", 3)]
    assert choose_device("cpu") == torch.device("cpu")


def test_more_processes_than_gpus_are_refused_with_their_number(four_gpus, monkeypatch):
    under_torchrun(monkeypatch, 0, 8, 8)
    with pytest.raises(
        SmolseekError, match=r"8 processes run on this machine, but it has only 4 CUDA devices: .*--nproc-per-node 4"
    ):
        choose_device("auto")
    assert not four_gpus


def test_processes_without_a_local_rank_are_refused(four_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SmolseekError, match="LOCAL_RANK is not set"):
        choose_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without")
@pytest.mark.parametrize(("local", "lines"), [(0, 1), (1, 0)])
def test_one_process_of_each_machine_prints_the_error_of_all(local, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert main(["train", "tiny", "--device", "cuda", "--run", "unused"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA device, but none is visible") == lines


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_emulated_products_give_a_warning(precision, run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("smolseek.train.resume.capability", lambda device: Capability())
    (tmp_path / "few.txt").write_text("too little to train on")
    arguments = ("--device", "cpu", "--precision", precision, "--run", tmp_path / "run")
    said = run_cli("train", "tiny", "--data", tmp_path / "few.txt", *arguments)
    assert said.code == 2 and ("has no bfloat16 matrix multiplication" in said.err) == (precision == "bfloat16")
