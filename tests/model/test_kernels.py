"""Where Triton does not run, PyTorch's operations do."""

import torch

import smolseek.model
from smolseek.model import kernels


class Broken:
    """As model/gpu.py where Triton finds no C compiler."""

    @staticmethod
    def swiglu_back(h, dy):
        raise RuntimeError("Failed to find C compiler.\nAnd more")


class Works:
    """As model/gpu.py on a GPU."""

    @staticmethod
    def swiglu_back(h, dy):
        return torch.zeros_like(h)


def test_triton_is_tried_once_and_its_absence_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    for room, runs in ((Broken, False), (Works, True)):
        monkeypatch.setattr(kernels, "TRITON", None)
        monkeypatch.setattr(smolseek.model, "gpu", room, raising=False)
        assert kernels.triton_runs(torch.device("cpu")) is runs and kernels.TRITON is runs
    error = capsys.readouterr().err
    assert "only costs time: Failed to find C compiler." in error and error.count("\n") == 1


def test_without_triton_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels, "TRITON", None)
    assert not kernels.triton_runs(torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_nothing_on_a_cpu_is_for_it(monkeypatch):
    monkeypatch.setattr(kernels, "TRITON", True)
    assert not kernels.on_gpu(torch.zeros(1))
