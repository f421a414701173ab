"""What the devices of this machine can compute."""

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 products; where it has not, their emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private, so it may go: float32 is then the safe answer.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and supported()
