"""The bridge for groups of the packed layout: decode several matrices in one launch, one after the other."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from vllm_dfloat.codec import descriptor, layout
from vllm_dfloat.codec.decode import check_status
from vllm_dfloat.device import ops
from vllm_dfloat.device.checks import check_tensor
from vllm_dfloat.device.group_tables import (
    Rows,
    Shape,
    check_table,
    desc_at,
    make_table,
    sealed_rows,
    sound_rows,
)


def first_tiles(shapes: Sequence[Shape]) -> list[int]:
    """Return the first tile of each matrix of a group in the decoded output, then the number of tiles of the group."""
    return list(accumulate((ops.num_tiles(*shape) for shape in shapes), initial=0))


def group_table(descs: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> torch.Tensor:
    """Return the table that `decode_group` reads, on the device of the descriptors; see `make_table`."""
    return make_table(descs, shapes, table_rows)


def table_rows(table: torch.Tensor, descs: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> Rows:
    """Return the rows that a table of these members must hold (kernels/group_decode.py)."""
    salts = [
        descriptor.salt(desc.data_ptr(), ops.num_tiles(*shape))
        for desc, shape in zip(descs, shapes, strict=True)
    ]
    return sealed_rows(table.data_ptr(), descs, first_tiles(shapes), salts)


def max_numel(device: torch.device) -> int:
    """Return the largest group, in weights, for which one launch beats one per matrix; 0 if never.

    It is a launch parameter of the device (kernels/configs.py); without Triton a launch costs nothing.
    """
    if not ops.uses_triton(device):
        return 0
    from vllm_dfloat.kernels.configs import config_of

    return config_of(device).group_decode_max_numel


def decode_group(
    table: torch.Tensor, num_tiles: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Decode the matrices that `table` lists; does not wait for the device, allocates nothing on a GPU.

    Args:
        table: from `group_table`.
        num_tiles: tiles of all matrices together, `first_tiles(shapes)[-1]`.
        out: BF16, flat, contiguous, at least `num_tiles * 2048` elements, aligned to 16 bytes.
        status: int32, at least `num_tiles`; 0 per tile, or a sum of STATUS_* bits.

    Raises:
        UnsupportedError: a tensor of another dtype, size, device or alignment.
        FormatError: on a CPU, the table or a descriptor was changed.
    """
    check_table("decode_group", table)
    numel = num_tiles * layout.TILE_WEIGHTS
    check_tensor("decode_group: out", out, torch.bfloat16, numel, table.device, 16)
    check_tensor("decode_group: status", status, torch.int32, num_tiles, table.device)
    launch_decode_group(table, num_tiles, out, status)


def launch_decode_group(
    table: torch.Tensor, num_tiles: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Do what `decode_group` does without its checks: for forward passes, whose buffers the scratch arena made."""
    if ops.uses_triton(out.device):
        from vllm_dfloat.kernels.group_decode import decode_group as decode_group_triton

        decode_group_triton(table, num_tiles, out, status)
        return
    for (address, first, *_), (_, after, *_) in pairwise(sound_rows(table, num_tiles)):
        # Packed memory is tile by tile: a matrix of the same tiles, each one row, has the same bytes as the member.
        shape = after - first, layout.TILE_WEIGHTS
        at = out[first * layout.TILE_WEIGHTS :]
        ops.launch_decode(desc_at(address), *shape, at, status[first:])


def unpack(members: Sequence[ops.PackedWeight]) -> list[torch.Tensor]:
    """Return the BF16 matrices of a group, decoded in one launch; check every tile's status and all bytes.

    Raises:
        FormatError: a payload or descriptor changed after encoding.
        UnsupportedError: no members, too many, or an empty one.
    """
    shapes = [(packed.rows, packed.cols) for packed in members]
    table = group_table([packed.desc for packed in members], shapes)
    for packed in members:
        packed.check_descriptor()
    starts = first_tiles(shapes)
    device = table.device
    numel = starts[-1] * layout.TILE_WEIGHTS
    out = torch.empty(numel, dtype=torch.bfloat16, device=device)
    status = torch.full((starts[-1],), -1, dtype=torch.int32, device=device)
    decode_group(table, starts[-1], out, status)
    matrices = []
    for packed, (start, end) in zip(members, pairwise(starts), strict=True):
        check_status(status[start:end].cpu().numpy(), packed.name)
        packed.check_payload()
        matrix = out[start * layout.TILE_WEIGHTS :][: packed.rows * packed.cols]
        matrices.append(matrix.view(packed.rows, packed.cols))
    return matrices
