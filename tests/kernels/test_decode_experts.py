"""The kernels that mark and decode chosen experts, in Triton's interpreter, whatever the launch parameters."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import gaussian, poisoned, same_bits, to_torch

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import ops
from vllm_dfloat.kernels import expert_decode, expert_marks

POISON = 0x7FC1
CPU = torch.device("cpu")


@triton.jit
def _place_kernel(out_ptr, expert, numel):
    first, count = expert_decode._tiles_of_expert(expert, numel.to(tl.int64))
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, count.to(tl.int64))


@pytest.mark.parametrize("tiles_per_turn", [1, 2, 4])
@pytest.mark.parametrize("programs", [1, 3, 100])
def test_programs_share_the_tiles_of_chosen_experts(tiles_per_turn: int, programs: int) -> None:
    # Bug caught: a turn that goes over the end of an expert into the next one, which was not chosen.
    num_experts, rows, cols = 7, 3, 2048  # three tiles each
    bits = gaussian(num_experts * rows, cols)
    packed = ops.pack(to_torch(bits))
    out = poisoned((num_experts * rows, cols), POISON, CPU)
    status = torch.full((num_experts * rows,), -1, dtype=torch.int32)
    chosen = torch.tensor([0, 1, 0, 1, 1, 0, 0], dtype=torch.int32)
    expert_decode.decode_chosen(
        packed.desc,
        num_experts,
        rows * cols,
        chosen,
        out.view(-1),
        status,
        tiles_per_turn,
        programs,
    )
    is_chosen = chosen.bool().repeat_interleave(rows)
    assert torch.equal(status == 0, is_chosen)
    assert same_bits(out[is_chosen], to_torch(bits)[is_chosen])
    assert same_bits(out[~is_chosen], poisoned((4 * rows, cols), POISON, CPU))


@pytest.mark.parametrize("extra", [0, 1, expert_marks.IDS_AT_ONCE + 3])
def test_flags_are_cleared_and_set_by_one_program_or_by_many(extra: int) -> None:
    num_ids = expert_marks.ONE_PROGRAM_IDS + extra
    ids = torch.full((num_ids,), 3, dtype=torch.int32)
    ids[-1], ids[num_ids // 2] = 599, 0
    chosen = torch.full((600,), 7, dtype=torch.int32)  # more flags than a program clears at once
    expert_marks.mark_chosen(ids, None, chosen)
    assert chosen.nonzero().view(-1).tolist() == [0, 3, 599]
    assert chosen.max() == 1


def test_tiles_are_found_where_their_places_need_more_than_32_bits() -> None:
    # Bug caught: expert * weights in 32 bits, as with 256 experts of 4096 x 7168.
    out = torch.zeros(2, dtype=torch.int64)
    _place_kernel[(1,)](out, 255, 4096 * 7168)
    expected = [255 * 4096 * 7168 // TILE_WEIGHTS, 4096 * 7168 // TILE_WEIGHTS]
    assert out.tolist() == expected
