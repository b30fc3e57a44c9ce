"""Decide for each LM head whether the scratch holds all of it or a slab of it, when the whole model is loaded.

A head is often the largest matrix of a model by far. Scratch for all of it would be held for good, and is used once per
step; so the head gets a slab of what other layers need anyway.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from vllm_dfloat.codec.slabs import slab_rows, spans
from vllm_dfloat.device import slabs
from vllm_dfloat.device.scratch import MAIN_SLOT, Buffers, scratch
from vllm_dfloat.integration.layers import head_op, in_order, linear_op, proof_cache
from vllm_dfloat.integration.layers.embedding import DFloat11EmbeddingMethod
from vllm_dfloat.integration.layers.head_proof import SlabProduct, affordable, compare
from vllm_dfloat.integration.layers.in_order import InOrderProduct
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.layers.tying import is_tied
from vllm_dfloat.integration.seam import compat, gemms, layer_kinds, row_counts
from vllm_dfloat.integration.seam.names import logger

GIB = 1 << 30


def prepare(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Cut the compressed heads of a loaded model into slabs, prove where these give equal bits, reserve the scratch."""
    heads = list(heads_of(model, model_config))
    if not heads:
        return
    free = scratch.needed(heads[0].weight.device, MAIN_SLOT)
    told: set[str] = set()
    for layer in heads:
        line = _prepare(layer, vllm_config, free)
        if line and line not in told:
            logger.info("dfloat11: %s", line)
        told.add(line)


def heads_of(model: torch.nn.Module, model_config: Any) -> Iterator[Any]:
    """Yield the compressed layers that logits may be computed with: heads, and embeddings that serve as one.

    A model without any LM head may multiply by its embedding, as Gemma's do.
    """
    if not compat.is_last_stage() or str(getattr(model_config, "runner_type", "")) == "pooling":
        return
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if layer_kinds.is_vocabulary(layer) and not layer_kinds.is_left_out(layer)
    ]
    has_heads = any(map(layer_kinds.is_lm_head, layers))
    for layer in layers:
        is_head = layer_kinds.is_lm_head(layer) or is_tied(layer) or not has_heads
        is_ours = isinstance(layer.quant_method, DFloat11EmbeddingMethod)
        if is_head and is_ours and packed_of(layer) is not None:
            yield layer


def _prepare(layer: Any, vllm_config: Any, free: int) -> str:
    """Settle one head; return what is to be told of it.

    Args:
        free: elements of scratch that other layers need.
    """
    method, device = layer.quant_method, layer.weight.device
    layout, shape = BY_NAME[method.layout], (method.rows, method.cols)
    product, line = _by_slab(layer, vllm_config, free)
    method.slab = product.slab if product else 0
    if product:
        without = head_op.packed_numel(method.layout, device, *shape, method.fused_rows)
        numel = max(layout.scratch_numel(product.slab, method.cols), without)
    else:
        numel = layout.scratch_numel(*shape)
    scratch.require(device, numel, method.slots_of_heads)
    method.reserve_scratch(device)
    _compile(layer, product)
    return line


def _by_slab(layer: Any, vllm_config: Any, free: int) -> tuple[SlabProduct | None, str]:
    """Return the product by slab, proven as far as it can be, or None if the scratch holds the whole head."""
    method, device = layer.quant_method, layer.weight.device
    layout, rows, cols = BY_NAME[method.layout], method.rows, method.cols
    whole, bias = layout.scratch_numel(rows, cols), getattr(layer, "bias", None)
    is_auto = method.slab_option == "auto"
    limit = max(2 * free, slabs.default_bytes(device)) if is_auto else method.slab_option
    if whole <= free or method.slab_option == "off" or 2 * whole <= limit:
        return None, ""
    slab = slab_rows(rows, cols, limit)
    if slab == rows:
        return None, ""
    if gemms.is_tuned_later(method.gemm):
        why = (
            f"{method.gemm} is tuned after loading, so that no slab can be proven to have its bits"
        )
        return None, f"LM head [{rows}, {cols}]: the scratch holds all of it; {why}"
    product = SlabProduct(
        device, rows, cols, slab, method.gemm, None if bias is None else bias.dtype
    )
    most, sampled = row_counts.most(vllm_config), row_counts.most_sampled(vllm_config)
    to_compare = _affordable(product, sampled, most)
    started = time.perf_counter()
    if is_auto and device.type == "cpu" and len(to_compare) < sampled:
        to_compare = []  # not worth the time: memory is not short there
    compared, equal = _proven(product, to_compare)
    without = _without_decoding(layer)
    covered = equal | without
    what = f"LM head [{rows}, {cols}]"
    uncovered = frozenset(range(1, sampled + 1)) - covered
    if uncovered and ((is_auto and device.type == "cpu") or row_counts.captures_heads(vllm_config)):
        return (
            None,
            f"{what}: the scratch holds all of it; {_why_whole(uncovered, compared, sampled)}",
        )
    head_op.known[product] = head_op.Known(equal, not covered.issuperset(range(1, most + 1)))
    return product, (
        f"{what} in {-(-rows // slab)} slabs of {slab} rows, {2 * slab * cols / GIB:.3f} GiB of scratch instead of "
        f"{2 * whole / GIB:.3f}: equal bits at {len(equal)} of the {len(compared)} numbers of rows that were "
        f"compared, in {time.perf_counter() - started:.1f} s"
        f"{f'; not decoded at {len(without)} numbers of rows' if without else ''}"
        f"{_of_the_rest(len(covered), most, 2 * whole)}"
    )  # fmt: skip


def _why_whole(uncovered: frozenset[int], compared: frozenset[int], sampled: int) -> str:
    """Say why slabs do not serve at these of the numbers of rows that are sampled from."""
    if different := uncovered & compared:
        return f"slabs have other bits at {len(different)} of the {len(compared)} numbers of rows that were compared"
    return (
        f"slabs were not compared with it at {len(uncovered)} of the {sampled} numbers of rows that are sampled from, "
        "which would take too many operations or too much memory"
    )


def _without_decoding(layer: Any) -> frozenset[int]:
    """Return the numbers of rows at which a head is multiplied without decoding (proven_products.py)."""
    method, bias = layer.quant_method, getattr(layer, "bias", None)
    kind = None if bias is None else bias.dtype
    shape = layer.weight.device, method.rows, method.cols, method.layout, method.gemm
    found = in_order.known.get(InOrderProduct(*shape, kind), frozenset())
    return frozenset(count for count in found if count <= method.in_order_rows)


def _of_the_rest(num_equal: int, most: int, num_bytes: int) -> str:
    if num_equal >= most:
        return ""
    return (
        f"; for others up to {most} the whole head is decoded, {num_bytes / GIB:.3f} GiB for the time of a product, "
        "counted with the activations"
    )


def _affordable(product: SlabProduct, sampled: int, most: int) -> list[int]:
    """Return the numbers of rows to compare: all that occur, or if that takes too long those that are sampled from."""
    work = slabs.proof_work(product.device)
    counts = row_counts.in_order(sampled, most)
    found = affordable(product, counts, work)
    if len(found) < len(counts):
        found = affordable(product, row_counts.in_order(sampled, sampled), work)
    return found


def _proven(product: SlabProduct, counts: list[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Return which of these numbers of rows were compared, now or earlier, and at which of those the bits are equal."""
    compared, equal = proof_cache.load(product)
    missing = [count for count in counts if count not in compared]
    if missing:
        found = compare(product, missing)  # less than `missing` if memory does not suffice
        compared |= found.keys()
        equal |= {count for count, is_equal in found.items() if is_equal}
        proof_cache.save(product, compared, equal)
    return compared & set(counts), equal & set(counts)


def _compile(layer: Any, product: SlabProduct | None) -> None:
    """On a GPU, compile every kernel that the head needs."""
    method, packed = layer.quant_method, packed_of(layer)
    layout, device = BY_NAME[method.layout], layer.weight.device
    buffers: Buffers | None = None
    if product and device.type == "cuda":
        assert packed is not None  # as `_heads` says
        out, status = scratch.take(device, layout.scratch_numel(product.slab, product.cols))
        for first, end in spans(product.rows, product.slab):
            layout.decode_run(
                packed.desc, product.rows, product.cols, first, end - first, out, status
            )
        if method.fused_rows:
            rows, cols = product.rows, product.cols
            buffers = head_op.whole_buffers(packed.desc, rows, cols, method.layout, 1)
    bias = getattr(layer, "bias", None)
    linear_op.compile_fused(packed, method.layout, bias, method.fused_rows, buffers)
