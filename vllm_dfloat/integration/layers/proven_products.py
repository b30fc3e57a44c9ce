"""Prove, after loading, which layers may be multiplied without decoding in mode "fused-exact".

What was found is kept (proof_cache.py), and told in one line.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_dfloat.integration.layers import heads, in_order, product_proof, proof_cache
from vllm_dfloat.integration.layers.in_order import InOrderProduct
from vllm_dfloat.integration.layers.method import PackedMethod, packed_of
from vllm_dfloat.integration.seam import layer_kinds
from vllm_dfloat.integration.seam.names import logger


def prepare(model: torch.nn.Module, model_config: Any) -> None:
    """Prove the products of a loaded model in mode "fused-exact", and say for how many it holds."""
    layers = list(_layers(model, model_config))
    if not layers:
        return
    found = {product: _known(product) for layer in layers for product in _products(layer)}
    for layer in layers:
        compile_kernels(layer)
    logger.info("dfloat11: fused-exact: %s", _line(found))


def _layers(model: torch.nn.Module, model_config: Any) -> Iterator[Any]:
    """Yield the layers that ask for a proof, without embeddings that are only looked up."""
    multiplied = list(heads.heads_of(model, model_config))
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        is_ours = isinstance(method, PackedMethod) and packed_of(layer) is not None
        multiplies = not layer_kinds.is_vocabulary(layer) or any(
            layer is head for head in multiplied
        )
        if is_ours and multiplies and method.asks_for_proof():
            yield layer


def _products(layer: Any) -> Iterator[InOrderProduct]:
    """Yield the products that a layer may ask for: with its bias, and without it for skip_bias_add."""
    method, bias = layer.quant_method, getattr(layer, "bias", None)
    for kind in dict.fromkeys((None if bias is None else bias.dtype, None)):
        yield InOrderProduct(
            layer.weight.device, method.rows, method.cols, method.layout, method.gemm, kind
        )


def _line(found: dict[InOrderProduct, frozenset[int]]) -> str:
    """Return what is to be told: each shape with the numbers of rows at which its products are all equal."""
    shapes: dict[tuple[int, int], list[InOrderProduct]] = {}
    for product in found:
        shapes.setdefault((product.rows, product.cols), []).append(product)
    told = []
    for (rows, cols), products in shapes.items():
        equal = frozenset.intersection(*(found[product] for product in products))
        if equal:
            most = max(map(in_order.max_rows, products))
            told.append(f"[{rows}, {cols}] at {len(equal)} of {most} numbers of rows")
    if not told:
        return (
            f"proven equal to vLLM's GEMM for none of {len(shapes)} shapes of matrices on this device; all are decoded "
            "first, as in mode 'exact'"
        )
    return (
        f"proven equal to vLLM's GEMM on this device for {len(told)} of {len(shapes)} shapes of matrices, which are "
        f"multiplied without decoding: {', '.join(told)}; all else is decoded first"
    )


def _known(product: InOrderProduct) -> frozenset[int]:
    """Return the numbers of rows for which a product is equal, as known, as kept, or compared now."""
    if product not in in_order.known:
        most = in_order.max_rows(product)
        in_order.known[product] = _proven(product, range(1, most + 1)) if most else frozenset()
    return in_order.known[product]


def _proven(product: InOrderProduct, counts: Sequence[int]) -> frozenset[int]:
    compared, equal = proof_cache.load(product)
    missing = [count for count in counts if count not in compared]
    if missing:
        found = product_proof.compare(product, missing)
        equal |= {count for count, is_equal in found.items() if is_equal}
        proof_cache.save(product, compared | found.keys(), equal)
    return equal & set(counts)


def compile_kernels(layer: Any) -> None:
    """On a GPU, compile every kernel that a layer's products need; a kept proof has compiled none."""
    packed = packed_of(layer)
    if packed is None or packed.desc.device.type != "cuda":
        return
    for product in _products(layer):
        equal = in_order.known.get(product, frozenset())
        for num_x in product.variants(max(equal, default=0)).values():
            _launch_once(product, num_x, packed.desc)


_launched: set[tuple[InOrderProduct, int]] = set()


def _launch_once(product: InOrderProduct, num_x: int, desc: torch.Tensor) -> None:
    if (product, num_x) in _launched:
        return
    _launched.add((product, num_x))
    device = product.device
    x = torch.zeros(num_x, product.cols, dtype=torch.bfloat16, device=device)
    bias = (
        None
        if product.bias is None
        else torch.zeros(product.rows, dtype=product.bias, device=device)
    )
    in_order.multiply(x, desc, bias, product)
