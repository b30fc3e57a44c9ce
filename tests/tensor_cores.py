"""A model of the tensor cores of generation 8.0, for kernels that are interpreted or emulated.

A step adds 16 products to each FP32 sum, by default 8 at a time, and cuts the result off toward zero. Real ones keep a
few bits less of each product, but take the same products in the same order: a kernel that takes others, or in another
order, gets other bits here as there. Unlike NumPy's product, a sum's bits do not depend on the shape of the operands.
"""

from typing import Any

import numpy as np
import pytest

STEP = 16
TOGETHER = 8  # products


def _cut(x: np.ndarray) -> np.ndarray:
    """Return FP64 numbers as FP32, cut off toward zero."""
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray, together: int = TOGETHER) -> np.ndarray:
    """Return c + a @ b for FP32 a [.., M, K], b [.., K, N] and c [.., M, N]; `together` divides K.

    With `together` of 1 also another order within a step, which real tensor cores may not tell from this one, gives
    other bits; with 16 all of a step is added at once.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, a.shape[-1], together):
            total = c.astype(np.float64)
            for k in range(first, first + together):
                total += a[..., k, None].astype(np.float64) * b[..., None, k, :]
            c = _cut(total)
    return c


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return FP32 numbers from BF16 bits of any integer type."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def interpret_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter multiply with this model, BF16 operands too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def values(handle: Any) -> np.ndarray:
        return from_bf16(handle.data) if handle.data.dtype == np.uint16 else handle.data

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return TensorHandle(product(values(a), values(b), d.data), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
