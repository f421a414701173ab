"""Which tensors a backend supports, SMOLSEEK_BACKEND, and the fallback to PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from smolseek.device import cuda_capability
from smolseek.errors import SmolseekError
from smolseek.ops import backend, swiglu, trial
from smolseek.ops.backend import c_supports


def fails(device, dtype):
    """Act like the trial on a machine where Triton finds no C compiler."""
    raise RuntimeError("Failed to find C compiler.\nAnd more")


@pytest.mark.parametrize(
    ("trial_of", "problem"),
    [
        (fails, "Failed to find C compiler."),
        (lambda device, dtype: "cross_entropy", "cross_entropy computes something else"),
        (lambda device, dtype: None, None),
    ],
)
def test_triton_is_tried_once_for_each_number_format_and_a_failure_is_one_line(
    monkeypatch, use_backend, stand_in, capsys, trial_of, problem
):
    use_backend(None)
    stand_in("cpu", cuda_capability((7, 5), False))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "TRITON", {})
    tried = []
    monkeypatch.setattr(trial, "disagreeing", lambda device, dtype: tried.append(dtype) or trial_of(device, dtype))
    for dtype in (torch.float16, torch.float16, torch.float32, torch.float64):
        assert backend.triton_supports(torch.zeros(2, dtype=dtype)) == (problem is None and dtype != torch.float64)
    assert tried == [torch.float16, torch.float32]
    error = capsys.readouterr().err
    assert error.count("\n") == (0 if problem is None else 2)
    if problem is not None:
        assert f"in float16, so PyTorch's slower operations are used: {problem}" in error


def test_without_triton_there_is_no_warning(monkeypatch, use_backend, capsys):
    use_backend(None)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "TRITON", {})
    assert not backend.triton_runs(torch.device("cpu"), torch.float32)
    assert capsys.readouterr().err == ""


def test_triton_supports_nothing_on_a_cpu(monkeypatch):
    monkeypatch.setattr(backend, "TRITON", {torch.float32: True})
    assert not backend.triton_supports(torch.zeros(1))


def test_the_override_is_logged_and_turns_the_kernels_off(monkeypatch, use_backend, capsys):
    use_backend("reference")
    assert backend.library() is None and backend.compiled() is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "SMOLSEEK_BACKEND=reference" in error
    gate, up = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    assert torch.equal(swiglu.swiglu(gate, up), F.silu(gate) * up)
    assert not c_supports(torch.zeros(2, 16, dtype=torch.bfloat16)) and not c_supports(torch.zeros(2, 16))
    use_backend("triton")
    assert backend.library() is None
    with pytest.raises(SmolseekError, match="SMOLSEEK_BACKEND=metal is not a backend: use reference, cpu or triton"):
        use_backend("metal")
        backend.library()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_which_tensors_the_c_files_support(dtype, use_backend):
    use_backend("cpu", bfloat16=dtype == torch.bfloat16)
    assert c_supports(torch.zeros(2, 16, dtype=dtype))
    assert c_supports(torch.zeros(2, 24, dtype=dtype)) == (dtype == torch.float32)  # bfloat16 needs a multiple of 16
    assert not c_supports(torch.zeros(2, 32, dtype=dtype)[:, ::2]) and not c_supports(torch.zeros(2, 16).double())


@pytest.mark.parametrize("numbers", [0, 1, 768, 960, 1536, 7168, 128 * 128])
def test_warps_are_a_power_of_two(numbers):
    assert backend.triton_warps(numbers) in (1, 2, 4, 8, 16)
