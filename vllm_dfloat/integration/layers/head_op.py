"""The op `vllm_dfloat::head`: multiply by an LM head that is larger than the scratch, to the bits of BF16 vLLM.

Where that was proven to give the same bits, it is multiplied without decoding (in_order.py), or decoded slab by slab
into the scratch, each of which is multiplied into its columns of the result (head_proof.py). Otherwise the whole head
is decoded into memory that is allocated for this product alone. vLLM's profile run calls the op before there is a KV
cache; its first call takes that memory once, so that vLLM counts it among the activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.codec.slabs import spans
from vllm_dfloat.device import ops
from vllm_dfloat.device.packed_weight import name_at
from vllm_dfloat.device.scratch import Buffers, scratch
from vllm_dfloat.errors import DeviceError
from vllm_dfloat.integration.layers import in_order
from vllm_dfloat.integration.layers.head_proof import ALIGNMENT, SlabProduct
from vllm_dfloat.integration.layers.in_order import InOrderProduct
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.linear_op import find_gemm
from vllm_dfloat.integration.layers.registration import register
from vllm_dfloat.integration.seam import slots


@dataclass
class Known:
    """What is known of a product by slab.

    Attributes:
        equal: the numbers of rows of activations for which it has the bits of the whole product.
        is_to_be_counted: whether the whole head may be needed, and its memory has not been taken yet.
    """

    equal: frozenset[int]
    is_to_be_counted: bool


known: dict[SlabProduct, Known] = {}


def head(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: Sequence[int],
    gemm: str,
    layout: str,
) -> torch.Tensor:
    """Return x @ weight.T + bias for the weight [rows, cols] that `desc` describes; does not wait for the device.

    Args:
        sizes: rows and cols of the weight; the largest number of rows of x that are multiplied without decoding, 0 for
            never; the same for products that have the bits of the GEMM, for each of which it must be proven; rows of a
            slab.
        gemm: name of the GEMM, for `find_gemm`.
        layout: how the weight is held, a name in layouts.py.

    Raises:
        DeviceError: no memory for the whole head, or it would be needed while a CUDA graph is captured.
    """
    rows, cols, fused_rows, in_order_rows, slab = sizes
    num_x, kind = x.numel() // cols, None if bias is None else bias.dtype
    product = SlabProduct(x.device, rows, cols, slab, gemm, kind)
    found = known.get(product)
    if found is not None and found.is_to_be_counted and not _is_capturing(x.device):
        found.is_to_be_counted = False
        whole_buffers(desc, rows, cols, layout, num_x)
    if 0 < num_x <= fused_rows and x.dtype == torch.bfloat16:  # or as vLLM's GEMM says
        return _multiply_packed(x, desc, bias, rows, cols, layout)
    if 0 < num_x <= in_order_rows and in_order.is_proven(x, bias, rows, cols, layout, gemm):
        without = InOrderProduct(x.device, rows, cols, layout, gemm, kind)
        y = in_order.multiply(x.reshape(-1, cols), desc, bias, without)
        return y.view(*x.shape[:-1], rows)
    if found is not None and num_x in found.equal and _is_as_proven(x):
        return _by_slab(x, desc, bias, product, layout)
    out, status = whole_buffers(desc, rows, cols, layout, num_x)
    BY_NAME[layout].decode(desc, rows, cols, out, status)
    return find_gemm(gemm)(x, out[: rows * cols].view(rows, cols), bias)


def _is_as_proven(x: torch.Tensor) -> bool:
    """Return whether activations lie in memory as those did that were compared; a GEMM may depend on it."""
    is_aligned = x.device.type == "cpu" or x.data_ptr() % ALIGNMENT == 0
    return x.dtype == torch.bfloat16 and x.dim() == 2 and x.is_contiguous() and is_aligned


def _by_slab(
    x: torch.Tensor, desc: torch.Tensor, bias: torch.Tensor | None, of: SlabProduct, layout: str
) -> torch.Tensor:
    held, multiply = BY_NAME[layout], find_gemm(of.gemm)
    numel = held.scratch_numel(of.slab, of.cols)
    out, status = scratch.take(x.device, numel, slots.slot(x.device))
    y = x.new_empty((x.shape[0], of.rows))
    for first, end in spans(of.rows, of.slab):
        held.decode_run(desc, of.rows, of.cols, first, end - first, out, status)
        weight = out[: (end - first) * of.cols].view(end - first, of.cols)
        y[:, first:end] = multiply(x, weight, None if bias is None else bias[first:end])
    return y


def _multiply_packed(
    x: torch.Tensor, desc: torch.Tensor, bias: torch.Tensor | None, rows: int, cols: int, layout: str
) -> torch.Tensor:  # fmt: skip
    """Multiply a few rows of activations without decoding; partial sums and status share the scratch of a slab."""
    product, num_x = BY_NAME[layout].product, x.numel() // cols
    assert product is not None  # or fused_rows is 0
    words, tiles = product.partials(x.device, rows, cols, num_x), ops.num_tiles(rows, cols)
    numel = packed_numel(layout, x.device, rows, cols, num_x)
    memory, _ = scratch.take(x.device, numel, slots.slot(x.device))
    buffers = memory[: 2 * words], memory.view(torch.int32)[words : words + tiles]
    y = product.launch(x.reshape(-1, cols), desc, rows, cols, bias, buffers)
    return y.view(*x.shape[:-1], rows)


def packed_numel(layout: str, device: torch.device, rows: int, cols: int, num_x: int) -> int:
    """Return the elements of scratch, whole tiles, for multiplying up to num_x rows without decoding."""
    product = BY_NAME[layout].product
    if product is None or not num_x:
        return 0
    words = product.partials(device, rows, cols, num_x) + ops.num_tiles(rows, cols)
    return ops.padded_numel(2, words)


def whole_buffers(desc: torch.Tensor, rows: int, cols: int, layout: str, num_x: int) -> Buffers:
    """Return memory for a whole head: the scratch if it is large enough, or else new memory.

    Raises:
        DeviceError: there is none, or a CUDA graph is being captured.
    """
    numel, device = BY_NAME[layout].scratch_numel(rows, cols), desc.device
    slot = slots.slot(device)
    if scratch.numel(device, slot) >= numel:
        return scratch.take(device, numel, slot)
    what = (
        f"{name_at(desc.data_ptr()) or 'LM head'}: the whole head for {num_x} rows of activations"
    )
    advice = (
        'Set "slab": "off" in the options of dfloat11: the scratch then holds it from the start.'
    )
    if _is_capturing(device):
        raise DeviceError(
            f"{what} during CUDA graph capture; expected a number of rows that slabs were proven equal for. {advice}"
        )
    try:
        out = torch.empty(numel, dtype=torch.bfloat16, device=device)
        return out, torch.empty(numel // TILE_WEIGHTS, dtype=torch.int32, device=device)
    except RuntimeError as error:  # also OutOfMemoryError
        raise DeviceError(
            f"{what} needs {2 * numel} bytes on {device} beside what is held, and they are not there ({error}). "
            f"{advice} Or leave more free with --gpu-memory-utilization."
        ) from error


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _head_fake(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: Sequence[int],
    gemm: str,
    layout: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sizes[0]))


op: Callable[..., torch.Tensor] = register(
    "head(Tensor x, Tensor desc, Tensor? bias, int[] sizes, str gemm, str layout) -> Tensor",
    head,
    _head_fake,
)
