"""Products without decoding that have the bits of vLLM's GEMM: the mode `fused-exact`.

The kernel takes the columns in order, 16 at a time, into one sum. So does vLLM's own kernel for VLLM_BATCH_INVARIANT,
and other GEMMs may. None is relied upon: which products are equal on this device is found out after loading
(product_proof.py), and all others are decoded first.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.seam import gemms

ALIGNMENT = 256  # bytes; the largest that cuBLAS asks for
BATCH_INVARIANT = "batch_invariant"  # the name of vLLM's GEMM under VLLM_BATCH_INVARIANT


@dataclass(frozen=True)
class InOrderProduct:
    """A product, as far as its bits depend on it; the number of rows of activations comes on top.

    Attributes:
        device: where it is computed.
        rows, cols: shape of the weight.
        layout: how the weight is held, a name in layouts.py.
        gemm: name of vLLM's GEMM, for `find_gemm`.
        bias: dtype of the bias; None without one.
    """

    device: torch.device
    rows: int
    cols: int
    layout: str
    gemm: str
    bias: torch.dtype | None = None

    def facts(self) -> dict[str, Any]:
        """Return, as JSON, all that its bits depend on beside the device and the libraries."""
        of = BY_NAME[self.layout].in_order
        kernels = {} if of is None else of.facts(self.device, self.rows, self.cols)
        return kernels | {
            "rows": self.rows,
            "cols": self.cols,
            "layout": self.layout,
            "gemm": self.gemm,
            "bias": str(self.bias),
        }

    def variants(self, most: int) -> Mapping[Hashable, int]:
        """Return the kernels for up to `most` rows of activations, and for each a number of rows that uses it."""
        of = BY_NAME[self.layout].in_order
        return {} if of is None else of.variants(self.device, self.rows, self.cols, most)


known: dict[InOrderProduct, frozenset[int]] = {}  # numbers of rows of activations with equal bits


def max_rows(product: InOrderProduct) -> int:
    """Return up to how many rows of activations may be multiplied so, if it is proven; 0 for never."""
    of = BY_NAME[product.layout].in_order
    if of is None or gemms.is_tuned_later(product.gemm):
        return 0
    return of.max_rows(product.device, product.rows, product.cols)


def is_proven(
    x: torch.Tensor, bias: torch.Tensor | None, rows: int, cols: int, layout: str, gemm: str
) -> bool:
    """Return whether this product was proven to have the bits of vLLM's GEMM.

    A GEMM may depend on how its operands lie in memory, and what is compared has a number of the bias for each column
    of the result. In compiled models a bias may be whatever is added (compiling/additions.py).
    """
    if x.dtype != torch.bfloat16 or x.dim() < 2 or not _lies_as_proven(x):
        return False
    if bias is not None and not (bias.shape == (rows,) and _lies_as_proven(bias)):
        return False
    kind = None if bias is None else bias.dtype
    found = known.get(InOrderProduct(x.device, rows, cols, layout, gemm, kind))
    return found is not None and x.numel() // cols in found


def _lies_as_proven(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not (tensor.is_cuda and tensor.data_ptr() % ALIGNMENT)


def multiply(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    product: InOrderProduct,
) -> torch.Tensor:
    """Return x @ weight.T + bias for x [num_x, cols], without decoding; the bias is added where vLLM adds it."""
    of = BY_NAME[product.layout].in_order
    assert of is not None  # or nothing is proven
    nothing = torch.empty(0, dtype=torch.int32, device=x.device)
    memory = nothing.view(torch.bfloat16), nothing  # no scratch
    if bias is not None and product.gemm == BATCH_INVARIANT and gemms.adds_bias_to_rounded():
        return of.launch(x, desc, product.rows, product.cols, None, memory) + bias
    return of.launch(x, desc, product.rows, product.cols, bias, memory)
