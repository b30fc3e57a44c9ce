"""The op `vllm_dfloat::linear`: decode a weight into the scratch and run the GEMM that BF16 vLLM would run on it.

Decode and GEMM are one opaque op: Inductor would hoist a separate decode op, and decode all layers of a transformer
block before the first GEMM. Options can make the op decode a whole group at the group's first layer, or multiply a
small batch directly by the compressed weight.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import ops
from vllm_dfloat.device.scratch import Buffers, scratch
from vllm_dfloat.integration.layers import in_order
from vllm_dfloat.integration.layers.in_order import BATCH_INVARIANT, InOrderProduct
from vllm_dfloat.integration.layers.layouts import BY_NAME, Layout
from vllm_dfloat.integration.layers.registration import register
from vllm_dfloat.integration.seam import gemms, slots

# A name of a GEMM in addition to BATCH_INVARIANT and the values of vLLM's --linear-backend.
PLAIN = "plain"

Gemm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@functools.cache
def find_gemm(name: str) -> Gemm:
    """Return BF16 vLLM's GEMM (x, weight, bias) of this name on this platform."""
    if name == PLAIN:
        return torch.nn.functional.linear
    from vllm.platforms import current_platform

    if name == BATCH_INVARIANT:
        return gemms.batch_invariant_gemm()
    if current_platform.is_cpu():
        return cpu_gemm
    gemm = gemms.unquantized_gemm(name)
    return lambda x, weight, bias: gemm(None, x, weight, bias)


def is_traced_as_matmul(name: str) -> bool:
    """Return whether torch.compile sees BF16 vLLM's GEMM of this name as a matmul, which it may rewrite."""
    if name == BATCH_INVARIANT:
        return False
    return name == PLAIN or gemms.is_plain_gemm(gemms.unquantized_gemm(name))


def cpu_gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Do what BF16 vLLM does on a CPU, for equal bits: pack the weight for oneDNN or sgl, then multiply."""
    # Packing gets a detached bias: 0.28 takes the bias from the layer, later versions change the layer's bias.
    layer = _packed_for_cpu(weight, None if bias is None else bias.detach())
    return layer.cpu_linear(x, weight, layer.bias)  # type: ignore[no-any-return]


def _packed_for_cpu(weight: torch.Tensor, bias: torch.Tensor | None) -> SimpleNamespace:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = SimpleNamespace(weight=weight, bias=bias, cpu_linear=None)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return layer


def settle_bias(layer: torch.nn.Module) -> None:
    """Convert a loaded layer's bias to the form that the platform's GEMM needs, as BF16 vLLM does after loading."""
    from vllm.platforms import current_platform

    bias = getattr(layer, "bias", None)
    if current_platform.is_cpu() and bias is not None:
        # Packing for one of the CPU kernels converts the bias to float32.
        _packed_for_cpu(layer.get_parameter("weight").data, bias)


class Place(NamedTuple):
    """Where a weight lies in its decoded block, and with which others it is decoded; all in tiles of 2048 weights.

    Attributes:
        first_tile, block_tiles: its start, and the size of the block.
        group_tile, group_tiles: start and size of those that one launch decodes.
        group_row: the first row of the table of these.
    """

    first_tile: int
    block_tiles: int
    group_tile: int
    group_tiles: int
    group_row: int


def linear(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    tables: torch.Tensor | None,
    sizes: Sequence[int],
    gemm: str,
    layout: str,
) -> torch.Tensor:
    """Return x @ weight.T + bias for the weight [rows, cols] that `desc` describes.

    Does not wait for the device. Once the scratch is reserved, allocates only the result and what the GEMM needs.

    Args:
        tables: of the groups of the layer's block (grouping.py), or None if the layer is decoded alone.
        sizes: rows and cols of the weight; the largest number of rows of x that are multiplied without decoding it, 0
            for never; the same for products that have the bits of the GEMM, for each of which it must be proven. With
            tables, then, the numbers of a `Place`, and rows and cols of each weight that is decoded with this one. None
            of them depends on the weights' values, so a traced graph may keep them.
        gemm: name of the GEMM, for `find_gemm`.
        layout: how the weight is held, a name in layouts.py.
    """
    rows, cols, fused_rows, in_order_rows, *place = sizes
    slot, held = slots.slot(x.device), BY_NAME[layout]
    is_few = 0 < x.numel() <= fused_rows * cols
    if held.product is not None and is_few and x.dtype == torch.bfloat16:  # or as vLLM's GEMM says
        memory = scratch.take(x.device, held.scratch_numel(rows, cols), slot)
        y = held.product.launch(x.reshape(-1, cols), desc, rows, cols, bias, memory)
        if tables is not None:
            scratch.note_call(x.device, tables.data_ptr(), place[0], slot)
        return y.view(*x.shape[:-1], rows)
    if 0 < x.numel() <= in_order_rows * cols and in_order.is_proven(
        x, bias, rows, cols, layout, gemm
    ):
        kind = None if bias is None else bias.dtype
        product = InOrderProduct(x.device, rows, cols, layout, gemm, kind)
        y = in_order.multiply(x.reshape(-1, cols), desc, bias, product)
        if tables is not None:
            scratch.note_call(x.device, tables.data_ptr(), place[0], slot)
        return y.view(*x.shape[:-1], rows)
    if tables is None:
        out, status = scratch.take(x.device, held.scratch_numel(rows, cols), slot)
        held.decode(desc, rows, cols, out, status)
    else:
        out = _decoded_in_block(tables, place, slot, held)
    return find_gemm(gemm)(x, out[: rows * cols].view(rows, cols), bias)


def _decoded_in_block(
    tables: torch.Tensor, place: Sequence[int], slot: Hashable, held: Layout
) -> torch.Tensor:
    """Return scratch that begins with the weight; decode its group into its block if that was not done yet."""
    count = len(Place._fields)
    of = Place(*place[:count])
    (out, status), is_stale = scratch.take_for_group(
        tables.device, of.block_tiles * TILE_WEIGHTS, tables.data_ptr(), of.first_tile, slot, of.group_tile
    )  # fmt: skip
    if is_stale:
        shapes = list(zip(place[count::2], place[count + 1 :: 2], strict=True))
        table = tables[of.group_row :][: len(shapes) + 1]
        at = out[of.group_tile * TILE_WEIGHTS :]
        assert held.groups is not None  # or it has no table
        held.groups.launch(table, of.group_tiles, shapes, at, status[of.group_tile :])
    return out[of.first_tile * TILE_WEIGHTS :]


def _linear_fake(
    x: torch.Tensor,
    desc: torch.Tensor,
    bias: torch.Tensor | None,
    tables: torch.Tensor | None,
    sizes: Sequence[int],
    gemm: str,
    layout: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sizes[0]))


op: Callable[..., torch.Tensor] = register(
    "linear(Tensor x, Tensor desc, Tensor? bias, Tensor? tables, int[] sizes, str gemm, str layout) -> Tensor",
    linear,
    _linear_fake,
)

_compiled: set[tuple[object, ...]] = set()


def fused_rows(layout: str, device: torch.device, rows: int, cols: int) -> int:
    """Return up to how many rows of activations are multiplied by a weight [rows, cols] that is not decoded first.

    Args:
        layout: how the weight is held, a name in layouts.py.
    """
    product = BY_NAME[layout].product
    return 0 if product is None else product.max_rows(device, rows, cols)


def compile_fused(
    packed: ops.PackedWeight | None,
    layout: str,
    bias: torch.Tensor | None,
    most: int,
    memory: Buffers | None = None,
) -> None:
    """On a GPU, compile every kernel that a layer needs: for up to `most` rows of activations, and for more.

    vLLM's own warm-up may not use every number of rows, and nothing may compile while requests wait.

    Args:
        memory: scratch for the layer; None for that of the layers, which is reserved by now.
    """
    held = BY_NAME[layout]
    if packed is None or packed.desc.device.type != "cuda" or not most or held.product is None:
        return
    device, shape = packed.desc.device, (packed.rows, packed.cols)
    memory = memory or scratch.take(device, held.scratch_numel(*shape))
    if (device, layout, *shape) not in _compiled:
        # An LM head may get only few rows in the warm-up, but as many as a prompt has for prompt_logprobs.
        _compiled.add((device, layout, *shape))
        held.decode(packed.desc, *shape, *memory)
    # A layer with a bias multiplies without it for skip_bias_add, and if row-parallel on all ranks but the first.
    biases = [None] if bias is None else [bias, None]
    variants = held.product.variants(device, *shape, most)
    for (variant, num_x), given in itertools.product(variants.items(), biases):
        key = (device, layout, variant, given is None)
        if key not in _compiled:
            _compiled.add(key)
            x = torch.zeros(num_x, packed.cols, dtype=torch.bfloat16, device=device)
            held.product.launch(x, packed.desc, *shape, given, memory)
