"""Decode chosen experts of a tensor of experts, in one launch; the tensor is one matrix in the packed layout.

Which experts are chosen is known only on the device, so the grid must do for any choice. A program for every tile, most
of which ends at once, would cost as much as the decoding: a layer has over 200,000 tiles. Instead a fixed number of
programs shares the tiles of the chosen experts: each program counts them from the flags, and takes every n-th part.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.packed_decode import _decode_tiles
from vllm_dfloat.kernels.tiles import TILE_WEIGHTS, num_warps


@triton.jit
def _tiles_of_expert(expert, numel):
    """Return the first tile, int64, and the number of tiles, int32, in which an expert of `numel` weights lies."""
    start = expert.to(tl.int64) * numel
    first = start // TILE_WEIGHTS
    return first, ((start + numel - 1) // TILE_WEIGHTS - first + 1).to(tl.int32)


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_experts", "expert_numel", "num_tiles", "salt"])
def _decode_chosen_kernel(
    desc_ptr,  # int64[4]                       see kernels/tiles.py
    chosen_ptr,  # int32[num_experts]           0: leave this expert out
    out_ptr,  # uint32[num_tiles * 1024]        pairs of BF16, whole tiles
    status_ptr,  # int32[num_tiles]               0, or a sum of STATUS_* bits
    num_experts,  # int32
    expert_numel,  # weights of an expert
    num_tiles,  # int32                          of all experts
    salt,  # int64                               of the seal, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least num_experts
):
    """Decode the tiles of chosen experts, TILES at a time; leave all other tiles and their status words alone.

    Grid (any number of programs,). A tile that two chosen experts share is decoded for each, to the same bits.
    """
    expert = tl.arange(0, EXPERTS)
    chosen = tl.load(chosen_ptr + expert, mask=expert < num_experts, other=0)
    numel = tl.full([], 0, tl.int64) + expert_numel
    _, tiles = _tiles_of_expert(expert, numel)
    turns = tl.where(chosen != 0, (tiles + (TILES - 1)) // TILES, 0)
    ends = tl.cumsum(turns, axis=0)
    total = tl.sum(turns, axis=0)
    turn = tl.program_id(0)
    while turn < total:  # the interpreter of Triton 3.6 takes no range of tensors
        is_before = ends <= turn
        member = tl.sum(is_before.to(tl.int32), axis=0)
        place = turn - tl.max(tl.where(is_before, ends, 0), axis=0)
        first, count = _tiles_of_expert(member, numel)
        tile = (place * TILES + tl.arange(0, TILES))[:, None]
        tile = first + tl.minimum(tile, count - 1).to(tl.int64)
        _decode_tiles(desc_ptr, salt, tile, num_tiles.to(tl.int64), out_ptr, status_ptr, TILES)
        turn += tl.num_programs(0)


def decode_chosen(
    desc: torch.Tensor,
    num_experts: int,
    expert_numel: int,
    chosen: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
    tiles_per_turn: int = 0,
    programs: int = 0,
) -> None:
    """Decode chosen experts of the tensor that `desc` describes; allocates nothing and does not wait for the device.

    Args:
        desc: int64 [4] on the device, made by this process; the payload is read only if its seal is right.
        num_experts: experts of the tensor.
        expert_numel: weights of each, one after the other in the packed matrix.
        chosen: int32 [>= num_experts], 0 for those that are left out.
        out: BF16, flat, contiguous, whole tiles, aligned to 16 bytes.
        status: int32, a word per tile; 0, or a sum of STATUS_* bits.
        tiles_per_turn: 0 for `decode_tiles_per_program` of configs.py.
        programs: 0 for `chosen_programs` of configs.py.
    """
    num_tiles = triton.cdiv(num_experts * expert_numel, TILE_WEIGHTS.value)
    if num_tiles:
        config = config_of(out.device)
        tiles = tiles_per_turn or config.decode_tiles_per_program
        most = triton.cdiv(num_tiles, tiles) + num_experts  # an expert's last turn may be partial
        salt = descriptor.salt(desc.data_ptr(), num_tiles)
        _decode_chosen_kernel[(min(most, programs or config.chosen_programs),)](
            desc, chosen, out.view(torch.uint32), status, num_experts, expert_numel, num_tiles,
            salt, tiles, triton.next_power_of_2(num_experts), num_warps=num_warps(tiles),
        )  # fmt: skip
