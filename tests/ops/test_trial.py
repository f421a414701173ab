"""The trial of the Triton kernels accepts right kernels and names wrong ones."""

import importlib
import importlib.util

import pytest
import torch

from smolseek.ops import trial

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU with Triton's interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_kernels_agree(dtype):
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):  # as at the first use
        assert trial.disagreeing(DEVICE, dtype) is None


@pytest.mark.parametrize(
    ("operation", "kernel"),
    [
        ("swiglu", "swiglu_backward"),
        ("moe_permute", "unpermute_backward"),
        ("cross_entropy", "cross_entropy"),
        ("mla_attention", "rope_and_pack"),
        ("mla_attention", "rope_and_pack_backward"),
    ],
)
@pytest.mark.parametrize("how", ["wrong", "nan"])
def test_a_wrong_kernel_is_named(operation, kernel, how, monkeypatch):
    module = importlib.import_module(f"smolseek.ops.{operation}.triton")
    real = getattr(module, kernel)

    def wrong(*arguments):
        results = real(*arguments)
        out = results[0] if kernel == "cross_entropy" else arguments[-1]
        out.fill_(float("nan")) if how == "nan" else out.mul_(1.1)
        return results

    monkeypatch.setattr(module, kernel, wrong)
    assert trial.disagreeing(DEVICE, torch.float16) == kernel
