"""Find out for which numbers of rows of activations an LM head may be multiplied slab by slab, to the last bit.

A GEMM over fewer columns of the result may take another algorithm, and add in another order. Which one it takes
depends on shapes, types and alignment, not on values. So it is enough to compare the products of slabs and of the
whole head for one choice of values, if these show every change of order (cancelling.py).

What was found holds for that shape, device and libraries. Where the bits differ, or where nothing was compared, the
whole head is decoded.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.codec.slabs import spans
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.integration.layers.linear_op import find_gemm

ALIGNMENT = 256  # bytes; the largest that cuBLAS asks for


@dataclass(frozen=True)
class SlabProduct:
    """A product with an LM head, as far as its bits depend on it; the number of rows of activations comes on top.

    Attributes:
        device: where it is computed.
        rows, cols: shape of the head.
        slab: rows of a slab.
        gemm: name of the GEMM, for `find_gemm`.
        bias: dtype of the bias; None without one.
    """

    device: torch.device
    rows: int
    cols: int
    slab: int
    gemm: str
    bias: torch.dtype | None = None

    def facts(self) -> dict[str, Any]:
        """Return, as JSON, all that its bits depend on beside the device and the libraries."""
        return {
            "rows": self.rows,
            "cols": self.cols,
            "slab": self.slab,
            "gemm": self.gemm,
            "bias": str(self.bias),
        }


def least_rows(device: torch.device) -> int:
    """Return the number of rows of which a product takes about as long as of one: it reads the weights."""
    return 256 if device.type == "cuda" else 32


def affordable(product: SlabProduct, counts: Sequence[int], work: int) -> list[int]:
    """Return as many of the numbers of rows, from the first on, as can be compared with so many operations.

    Operations are counted, not seconds: every rank and every start comes to the same result.
    """
    per_row, least = 4 * product.rows * product.cols, least_rows(product.device)  # two products
    sums = itertools.accumulate(per_row * max(count, least) for count in counts)
    return [count for count, total in zip(counts, sums, strict=False) if total <= work]


def equal_counts(product: SlabProduct, counts: Sequence[int]) -> frozenset[int]:
    """Return those of these numbers of rows for which the product by slab has the bits of the whole one.

    Waits for the device. If its memory does not suffice, the numbers that were not compared count as different.
    """
    return frozenset(count for count, is_equal in compare(product, counts).items() if is_equal)


def compare(product: SlabProduct, counts: Sequence[int]) -> dict[int, bool]:
    """Return for each of these numbers of rows whether both products are equal, as far as memory suffices."""
    if not counts:
        return {}
    unequal: dict[int, torch.Tensor] = {}
    try:
        shape = max(counts), product.rows, product.cols
        x, weight, bias = cancelling.operands(*shape, product.bias, product.device)
        for count in counts:
            unequal[count] = _differs(product, x[:count], weight, bias)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return {count: not differs.item() for count, differs in unequal.items()}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device or the host had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _differs(
    product: SlabProduct, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return whether any bit differs, as a tensor that nothing waits for."""
    gemm = find_gemm(product.gemm)
    whole = gemm(x, weight, bias).view(torch.int16)
    differs = torch.zeros((), dtype=torch.bool, device=product.device)
    for first, end in spans(product.rows, product.slab):
        part = gemm(x, weight[first:end], None if bias is None else bias[first:end])
        differs |= (part.view(torch.int16) != whole[:, first:end]).any()
    return differs
