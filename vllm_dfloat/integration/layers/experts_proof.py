"""Compare products with experts without decoding with vLLM's own, bit for bit, on this device.

As product_proof.py does for one matrix, of operands that show each change of order (cancelling.py). There are few
experts: the order in which vLLM's kernel adds depends on its launch parameters, not on their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_dfloat.device.fast_expert_product import Routed
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.integration.layers.experts_product import RoutedProduct
from vllm_dfloat.integration.layers.head_proof import is_out_of_memory
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.product_proof import STOPS_AT_FIRST
from vllm_dfloat.integration.seam import expert_products

NUM_EXPERTS = 4


@dataclass(frozen=True)
class Operands:
    """What both products get, for some number of tokens; `weights`: FP32 [tokens, per_token], or None."""

    x: torch.Tensor
    routed: Routed
    weights: torch.Tensor | None


def compare(product: RoutedProduct, counts: Sequence[int]) -> dict[int, bool]:
    """Return for each of these numbers of tokens whether both products are equal, as far as memory suffices.

    Waits for the device. On a CPU the first one that is not equal is the last that is compared.
    """
    unequal: dict[int, torch.Tensor] = {}
    try:
        rows, device = NUM_EXPERTS * product.rows, product.device
        num_x = max(counts) * product.per_token // product.top_k
        x, weight, bias = cancelling.operands(num_x, rows, product.cols, product.bias, device)
        bias = None if bias is None else bias.view(NUM_EXPERTS, product.rows)
        packed = BY_NAME[product.layout].pack(weight, "experts of a proof")
        weight = weight.view(NUM_EXPERTS, product.rows, product.cols)
        for tokens in counts:
            given = operands(product, tokens, x)
            found = multiply(product, given, packed.desc, NUM_EXPERTS, bias)
            expected = _multiply_as_vllm(product, given, weight, bias)
            unequal[tokens] = (found.view(torch.int16) != expected.view(torch.int16)).any()
            if device.type in STOPS_AT_FIRST and unequal[tokens].item():
                break
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return {tokens: not differs.item() for tokens, differs in unequal.items()}


def operands(product: RoutedProduct, tokens: int, x: torch.Tensor) -> Operands:
    """Return the operands for some tokens; x: BF16, at least as many rows as they need.

    Each of the first experts has one row of the result, and the last one all others.
    """
    num_out, device = tokens * product.per_token, product.device
    x = x[: num_out // product.top_k]
    expert_of = torch.arange(num_out, dtype=torch.int32, device=device).clamp_(max=NUM_EXPERTS - 1)
    weights = None
    if product.weighs:
        generator = torch.Generator(device).manual_seed(tokens)
        weights = torch.rand(tokens, product.per_token, generator=generator, device=device)
    flat = None if weights is None else weights.view(-1)
    ids, block = None, dict(product.config)["BLOCK_SIZE_M"]
    num_padded = num_out * block
    if product.is_sorted:
        ids, expert_of = _sorted(num_out, block, device)
        num_padded = len(ids)
    padded = torch.full((1,), num_padded, dtype=torch.int32, device=device)
    return Operands(x, Routed(ids, padded, expert_of, block, tokens, product.top_k, flat), weights)


def _sorted(num_out: int, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of a result in blocks, filled up with num_out, and the expert of each block."""
    alone = min(num_out, NUM_EXPERTS - 1)
    rest = -(-(num_out - alone) // block)
    ids = torch.full((alone + rest, block), num_out, dtype=torch.int32)
    ids[:alone, 0] = torch.arange(alone)
    ids[alone:].view(-1)[: num_out - alone] = torch.arange(alone, num_out, dtype=torch.int32)
    expert_of = torch.arange(alone + rest, dtype=torch.int32).clamp_(max=NUM_EXPERTS - 1)
    return ids.view(-1).to(device), expert_of.to(device)


def multiply(
    product: RoutedProduct,
    given: Operands,
    desc: torch.Tensor,
    num_experts: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product without decoding, [tokens * per_token, rows]."""
    of = BY_NAME[product.layout].experts_product
    assert of is not None  # or it would not be known
    sizes = num_experts, product.rows, product.cols
    out = torch.full(
        (len(given.x) * product.top_k, product.rows),
        float("nan"),
        dtype=torch.bfloat16,
        device=product.device,
    )
    of.launch(given.x, desc, *sizes, given.routed, bias, out)
    return out


def _multiply_as_vllm(
    product: RoutedProduct,
    given: Operands,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    routed = given.routed
    assert routed.num_padded is not None
    out = torch.zeros(
        routed.num_tokens,
        product.per_token,
        product.rows,
        dtype=torch.bfloat16,
        device=product.device,
    )
    expert_products.multiply(
        given.x, weight, bias, given.weights, routed.ids, routed.expert_of_block, routed.num_padded,
        product.top_k, dict(product.config), out,
    )  # fmt: skip
    return out.view(-1, product.rows)
