"""The layouts in which compressed weights can be held: for each name a set of functions with the same signatures.

No other code knows which layout a weight is in, or what it can do.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.device import (
    experts,
    fast_expert_product,
    fast_experts,
    fast_fused,
    fast_groups,
    fast_ops,
    fused,
    groups,
    ops,
    unit_resident,
)
from vllm_dfloat.device.group_tables import Rows, Shape
from vllm_dfloat.device.scratch import Buffers


@dataclass(frozen=True)
class Product:
    """How a layout multiplies a few rows of activations by a weight without decoding it to memory.

    Attributes:
        max_rows: (device, rows, cols) -> the largest number of rows of activations for which it is used for such a
            weight; 0 for never.
        launch: (x, desc, rows, cols, bias, scratch) -> x @ weight.T + bias; called inside `vllm_dfloat::linear`.
            scratch: as `Layout.decode` takes it; overwritten.
        variants: (device, rows, cols, max_rows) -> for each kernel that such a weight needs for up to `max_rows` rows a
            key that tells it from others, and a number of rows that uses it. Each has a form with a bias and one
            without.
        partials: (device, rows, cols, num_x) -> the FP32 numbers that `launch` puts into the first buffer of scratch
            for up to num_x rows of activations.
        facts: (device, rows, cols) -> as JSON, what the bits depend on beside shape, device and libraries.
    """

    max_rows: Callable[[torch.device, int, int], int]
    launch: Callable[
        [torch.Tensor, torch.Tensor, int, int, torch.Tensor | None, Buffers], torch.Tensor
    ]
    variants: Callable[[torch.device, int, int, int], Mapping[Hashable, int]]
    partials: Callable[[torch.device, int, int, int], int]
    facts: Callable[[torch.device, int, int], dict[str, Any]] = lambda device, rows, cols: {}


@dataclass(frozen=True)
class ExpertsProduct:
    """How a layout multiplies a few tokens by their experts without decoding them, in the order of `Layout.in_order`.

    Attributes:
        max_tokens: (device, experts of all ranks, experts of a token, rows, cols) -> the largest number of tokens for
            which it is used for experts [rows, cols]; 0 for never.
        launch: (x, desc, num_experts, rows, cols, routed, bias, out): into `out`, as fast_expert_product.py says;
            called inside vLLM's kernel for experts.
        variants: (block, most) -> for each kernel that up to `most` tokens need, sorted in blocks of `block`, a key
            that tells it from others, and a number of tokens that uses it. Each has forms with and without biases and
            weights, for sorted tokens and others.
        facts: () -> as JSON, what the bits depend on beside shape, variant, device and libraries.
    """

    max_tokens: Callable[[torch.device, int, int, int, int], int]
    launch: Callable[
        [
            torch.Tensor, torch.Tensor, int, int, int, fast_expert_product.Routed, torch.Tensor | None, torch.Tensor,
        ],
        None,
    ]  # fmt: skip
    variants: Callable[[int, int], Mapping[Hashable, int]]
    facts: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Groups:
    """How a layout decodes several matrices in one launch, one after the other.

    Each takes as many whole tiles of the output as `Layout.scratch_numel` says.

    Attributes:
        table_rows: (table, descs, shapes) -> what the table that `launch` reads must hold, int64 [members + 1,
            ROW_WORDS] on the device of the descriptors; it depends on where it lies.
        launch: (table, num_tiles, shapes, out, status): all of them into the scratch; called inside
            `vllm_dfloat::linear`. num_tiles: of all together.
        max_numel: (device) -> the largest group, in weights, for which one launch was measured to beat one per matrix;
            0 if never.
    """

    table_rows: Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[Shape]], Rows]
    launch: Callable[[torch.Tensor, int, Sequence[Shape], torch.Tensor, torch.Tensor], None]
    max_numel: Callable[[torch.device], int] = lambda device: 0


@dataclass(frozen=True)
class Layout:
    """What linear layers, embeddings and experts use. Every layout's descriptors are int64 [ops.DESC_LENGTH].

    Attributes:
        pack: (weight, name) -> the compressed weight on the same device, whatever its size.
        decode: (desc, rows, cols, out, status): the whole matrix into the scratch; called inside `vllm_dfloat::linear`.
            It leaves the matrix in the first rows * cols elements of `out`.
        lookup: (desc, ids, rows, cols) -> BF16 [n, cols]: chosen rows; called inside `vllm_dfloat::lookup`.
        unpack: (packed) -> BF16 [rows, cols]; checks every status and all bytes.
        scratch_numel: (rows, cols) -> the elements of scratch that `decode` and the product need (scratch.py): whole
            tiles of the packed layout. So much is needed for a run of as many rows, too.
        decode_run: (desc, rows, cols, first, count, out, status): as `decode`, for `count` rows from row `first` on,
            where a tile begins (slabs.py).
        product: how it multiplies without decoding; None if it cannot.
        in_order: the same in the order in which a plain kernel of Triton adds; `launch` needs no scratch.
        pack_if_small: (weight, name) -> the same, or None if the matrix would not shrink enough. Without this function
            every matrix is held so.
        decode_chosen: (desc, num_experts, rows, cols, chosen, out, status): as `decode`, for a tensor of experts
            [num_experts, rows, cols], of which it decodes those chosen, each where it lies (experts.py); None if it
            decodes all or none.
        groups: how it decodes several matrices at once; None if it cannot.
        experts_product: how it multiplies by experts without decoding; None if it cannot.
    """

    pack: Callable[[torch.Tensor, str], ops.PackedWeight]
    decode: Callable[[torch.Tensor, int, int, torch.Tensor, torch.Tensor], None]
    lookup: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]
    unpack: Callable[[ops.PackedWeight], torch.Tensor]
    scratch_numel: Callable[[int, int], int]
    decode_run: Callable[[torch.Tensor, int, int, int, int, torch.Tensor, torch.Tensor], None]
    product: Product | None = None
    in_order: Product | None = None
    pack_if_small: Callable[[torch.Tensor, str], ops.PackedWeight | None] | None = None
    decode_chosen: (
        Callable[[torch.Tensor, int, int, int, torch.Tensor, torch.Tensor, torch.Tensor], None]
        | None
    ) = None
    groups: Groups | None = None
    experts_product: ExpertsProduct | None = None


BY_NAME: Mapping[str, Layout] = {
    "packed": Layout(
        ops.pack,
        ops.launch_decode,
        ops.decode_rows,
        ops.unpack,
        ops.padded_numel,
        ops.launch_decode_run,
        Product(fused.max_rows, fused.launch_matmul, fused.variants, fused.partials),
        decode_chosen=experts.launch_decode_chosen,
        groups=Groups(
            groups.table_rows,
            lambda table, num_tiles, shapes, out, status: groups.launch_decode_group(
                table, num_tiles, out, status
            ),
            groups.max_numel,
        ),
    ),
    "fast": Layout(
        fast_ops.pack_again,
        fast_ops.launch_decode,
        fast_ops.decode_rows,
        fast_ops.unpack,
        fast_ops.scratch_numel,
        fast_ops.launch_decode_run,
        Product(
            fast_fused.max_rows, fast_fused.launch_matmul, fast_fused.variants, fast_fused.partials
        ),
        in_order=Product(
            fast_fused.max_rows_in_order,
            fast_fused.launch_in_order,
            fast_fused.variants_in_order,
            lambda device, rows, cols, num_x: 0,
            fast_fused.facts_in_order,
        ),
        pack_if_small=fast_ops.pack,
        decode_chosen=fast_experts.launch_decode_chosen,
        groups=Groups(fast_groups.table_rows, fast_groups.launch_decode_group),
        experts_product=ExpertsProduct(
            fast_expert_product.max_tokens,
            fast_expert_product.launch,
            fast_expert_product.variants,
            fast_expert_product.facts,
        ),
    ),
    "dfloat11": Layout(
        unit_resident.pack,
        unit_resident.launch_decode,
        unit_resident.decode_rows,
        unit_resident.unpack,
        ops.padded_numel,
        unit_resident.launch_decode_run,
    ),
}

# Where a matrix is held that its layout would not make small enough.
OTHERWISE = "packed"


def pack_first(layout: str, weight: torch.Tensor, name: str) -> tuple[str, ops.PackedWeight]:
    """Return the layout in which a layer's first matrix is held, `layout` or OTHERWISE, and the compressed matrix.

    The layer keeps it, whatever the values of later matrices: compiled graphs name it.
    """
    held = BY_NAME[layout]
    if held.pack_if_small is None:
        return layout, held.pack(weight, name)
    packed = held.pack_if_small(weight, name)
    if packed is None:
        return OTHERWISE, BY_NAME[OTHERWISE].pack(weight, name)
    return layout, packed


def pack_first_of_all(
    layout: str, weights: Mapping[str, torch.Tensor]
) -> tuple[str, dict[str, ops.PackedWeight]]:
    """Return the layout in which matrices that share one are held, and by name those that are compressed already.

    All of them are, or none: where one would not shrink enough, the others are given up.
    """
    pack_if_small = BY_NAME[layout].pack_if_small
    if pack_if_small is None:
        return layout, {}
    found: dict[str, ops.PackedWeight] = {}
    for name, weight in weights.items():
        packed = pack_if_small(weight, name)
        if packed is None:
            return OTHERWISE, {}
        found[name] = packed
    return layout, found
