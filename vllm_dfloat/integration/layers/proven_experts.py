"""Settle, after loading, which products with experts are computed without decoding, and compile their kernels.

In mode "fused" all of up to so many tokens; in mode "fused-exact" those that are proven equal to vLLM's own. What was
proven is kept (proof_cache.py), and told in one line.
"""

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import torch

from vllm_dfloat.integration.layers import experts_product, experts_proof, proof_cache
from vllm_dfloat.integration.layers.experts import DFloat11ExpertsMethod
from vllm_dfloat.integration.layers.experts_kernel import HeldExperts
from vllm_dfloat.integration.layers.experts_product import RoutedProduct, frozen
from vllm_dfloat.integration.seam import expert_kernels, expert_products, layer_kinds
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.options import FUSED_EXACT

Counts = dict[RoutedProduct, set[int]]  # numbers of tokens


def prepare(model: torch.nn.Module) -> None:
    """Settle the products of a loaded model's experts; in mode "fused-exact" say for how many they are proven."""
    layers, lines = _layers(model)
    for line in lines:
        logger.info("dfloat11: %s", line)
    counts: Counts = {}
    asked = [products_of(layer, method) for layer, method in layers]
    for products in asked:
        for product, tokens in products.items():
            counts.setdefault(product, set()).update(tokens)
    for product, tokens in counts.items():
        used = _proven(product, tokens) if product.mode == FUSED_EXACT else tokens
        before = experts_product.known.get(product, frozenset())
        experts_product.known[product] = before | used
    for (_, method), products in zip(layers, asked, strict=True):
        if method.held.w13.desc.device.type == "cuda":
            compile_kernels(products, method.held)
    if proven := {
        product: found for product, found in counts.items() if product.mode == FUSED_EXACT
    }:
        logger.info("dfloat11: fused-exact: experts %s", _line(proven))


def _layers(
    model: torch.nn.Module,
) -> tuple[list[tuple[Any, DFloat11ExpertsMethod]], Collection[str]]:
    """Return the layers of experts that may be multiplied without decoding, and what is to be told of others."""
    found, lines = [], dict[str, None]()
    for layer in model.modules():
        method = expert_kernels.method_of(layer) if layer_kinds.is_experts(layer) else None
        if not isinstance(method, DFloat11ExpertsMethod):
            continue
        told = method.decoded_line
        if method.settle_most_tokens(layer):
            found.append((layer, method))
        elif method.decoded_line != told:
            lines[method.decoded_line] = None
    return found, lines


def products_of(layer: Any, method: DFloat11ExpertsMethod) -> Counts:
    """Return the products that a layer may ask for, each with its numbers of tokens."""
    held, experts = method.held, expert_kernels.experts_of_kernel(method)
    _, per_token, has_map = expert_products.sizes_of(method.moe)
    weighs = not getattr(layer, "apply_router_weight_on_input", False)
    found: Counts = {}
    for tokens in range(1, max(held.most_tokens) + 1):
        chosen = expert_products.config_for(
            experts, held.w13.shape, held.w2.shape, per_token, tokens
        )
        is_sorted = expert_products.is_sorted(tokens, per_token, held.w13.shape[0], has_map)
        for tensor, most, top_k, weighted, bias in (
            (held.w13, held.most_tokens[0], per_token, False, experts.w1_bias),
            (held.w2, held.most_tokens[1], 1, weighs, experts.w2_bias),
        ):
            if tokens <= most:
                _, rows, cols = tensor.sizes
                product = RoutedProduct(
                    tensor.desc.device, rows, cols, held.layout, held.mode, per_token, top_k, weighted,
                    None if bias is None else bias.dtype, is_sorted, frozen(chosen),
                )  # fmt: skip
                found.setdefault(product, set()).add(tokens)
    return found


def _proven(product: RoutedProduct, counts: Collection[int]) -> frozenset[int]:
    """Return the numbers of tokens at which a product is equal to vLLM's, as kept or compared now."""
    compared, equal = proof_cache.load(product)
    missing = sorted(set(counts) - compared)
    if missing:
        found = experts_proof.compare(product, missing)
        equal |= {count for count, is_equal in found.items() if is_equal}
        proof_cache.save(product, compared | found.keys(), equal)
    return equal & set(counts)


def _line(counts: Counts) -> str:
    """Return what is to be told: each shape of experts with the numbers of tokens at which its products are equal."""
    asked: dict[tuple[int, int], set[int]] = {}
    failed: dict[tuple[int, int], set[int]] = {}
    for product, tokens in counts.items():
        shape = product.rows, product.cols
        asked.setdefault(shape, set()).update(tokens)
        failed.setdefault(shape, set()).update(tokens - experts_product.known[product])
    told = [
        f"[{rows}, {cols}] at {len(tokens - failed[rows, cols])} of {len(tokens)} numbers of tokens"
        for (rows, cols), tokens in asked.items()
        if tokens - failed[rows, cols]
    ]
    if not told:
        return (
            f"proven equal to vLLM's kernel for none of {len(asked)} shapes on this device; all are decoded first, as "
            "in mode 'exact'"
        )
    return (
        f"proven equal to vLLM's kernel on this device for {len(told)} of {len(asked)} shapes, which are multiplied "
        f"without decoding: {', '.join(told)}; all else is decoded first"
    )


def compile_kernels(products: Iterable[RoutedProduct], held: HeldExperts) -> None:
    """Compile every kernel that a layer's products need, by using it; a kept proof has compiled none."""
    for product in products:
        most = max(experts_product.known.get(product, ()), default=0)
        for variant, tokens in product.variants(most).items():
            key = product.device, product.layout, variant, product.form
            if key not in _compiled:
                _compiled.add(key)
                _launch_once(product, tokens, held)


_compiled: set[Hashable] = set()


def _launch_once(product: RoutedProduct, tokens: int, held: HeldExperts) -> None:
    is_w2 = held.w2.sizes[1:] == (product.rows, product.cols)
    tensor = held.w2 if is_w2 else held.w13
    num_x = tokens * product.per_token // product.top_k
    x = torch.zeros(num_x, product.cols, dtype=torch.bfloat16, device=product.device)
    bias = None
    if product.bias is not None:
        bias = torch.zeros(*tensor.sizes[:2], dtype=product.bias, device=product.device)
    given = experts_proof.operands(product, tokens, x)
    experts_proof.multiply(product, given, tensor.desc, tensor.sizes[0], bias)
