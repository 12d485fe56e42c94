"""What this machine's matrix multiply reaches: the yardstick of a training run, and the choice of its precision."""

import time

import torch

SIZE = {"cpu": 1024, "cuda": 8192}
# bfloat16 must be clearly the faster one to be worth its digits.
BF16_SPEEDUP = 1.3


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second of the fastest of the square products done within `seconds`."""
    size = SIZE.get(device.type, 4096)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def choose_precision(device: torch.device) -> str:
    """ "bf16" where its products are clearly faster than float32's on this machine, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if matmul_peak(device, torch.bfloat16) > BF16_SPEEDUP * matmul_peak(device, torch.float32) else "fp32"
