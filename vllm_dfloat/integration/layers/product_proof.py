"""Compare products without decoding with vLLM's GEMM, bit for bit, on this device.

As head_proof.py does for slabs: for a shape and numbers of rows of activations both are computed, of operands that show
each change of order (cancelling.py). One comparison is enough, since a GEMM's order depends on shapes, not on values.
"""

from collections.abc import Sequence

import torch

from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.integration.layers import cancelling, in_order
from vllm_dfloat.integration.layers.head_proof import is_out_of_memory
from vllm_dfloat.integration.layers.in_order import InOrderProduct
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.linear_op import find_gemm

STOPS_AT_FIRST = ("cpu",)  # kinds of devices where the kernel is interpreted, and slow


def compare(product: InOrderProduct, counts: Sequence[int]) -> dict[int, bool]:
    """Return for each of these numbers of rows whether both products are equal, as far as memory suffices.

    Waits for the device. On a CPU the first one that is not equal is the last that is compared.
    """
    unequal: dict[int, torch.Tensor] = {}
    try:
        shape = max(counts), product.rows, product.cols
        x, weight, bias = cancelling.operands(*shape, product.bias, product.device)
        packed = BY_NAME[product.layout].pack(weight, "weights of a proof")
        for count in counts:
            unequal[count] = _differs(product, x[:count], weight, bias, packed)
            if product.device.type in STOPS_AT_FIRST and unequal[count].item():
                break
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return {count: not differs.item() for count, differs in unequal.items()}


def _differs(
    product: InOrderProduct,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed: PackedWeight,
) -> torch.Tensor:
    """Return whether any bit differs, as a tensor that nothing waits for."""
    expected = find_gemm(product.gemm)(x, weight, bias)
    found = in_order.multiply(x, packed.desc, bias, product)
    return (found.view(torch.int16) != expected.view(torch.int16)).any()
