"""The machine's matmul roofline: the most operations a second that a plain matrix product reaches here."""

from __future__ import annotations

from time import perf_counter

import torch

_SIZES = ((2048, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048), (1024, 1024, 1024))  # rows, inner, columns
_REPEATS = 5


def matmul_roofline(dtype: str) -> float:
    """Operations a second of the fastest of some products, two a multiplication and addition; best of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return max(_rate(*size, getattr(torch, dtype), device) for size in _SIZES)


def _rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    operations = 2 * rows * inner * columns
    calls = max(1, int(2e10 / operations))
    times = []
    for _ in range(_REPEATS + 1):
        began = perf_counter()
        for _ in range(calls):
            torch.nn.functional.linear(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return operations * calls / min(times[1:])
