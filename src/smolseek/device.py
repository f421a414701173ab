"""Which number formats a device multiplies."""

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 products; without, their emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A private function, which a later PyTorch may lack: float32 is the safe choice then.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and supported()
