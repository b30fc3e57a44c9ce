"""Decode chosen experts of a tensor of experts, in one launch; the tensor is one matrix in the fast layout.

As in expert_decode.py, a fixed number of programs shares the work, since only the device knows which experts are
chosen. What is shared are blocks of rows: a block that two experts share is decoded if either is chosen, and the row of
a block takes the same bytes whatever its weights are.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.fast_decode import _decode_block, constants_of
from vllm_dfloat.kernels.fast_planes import LOW_BYTES, TILE_COLS


@triton.jit
def _rows_of_expert(expert, expert_rows, ROWS: tl.constexpr):
    """Return the first block of ROWS rows in which an expert lies, and the number of these blocks; int32."""
    start = expert * expert_rows
    first = start // ROWS
    return first, (start + expert_rows - 1) // ROWS - first + 1


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_experts", "expert_rows", "cols", "salt", "low_bytes"])
def _fast_chosen_kernel(
    desc_ptr,  # int64[4]                 see codec/descriptor.py; num_entries and base as sizes
    chosen_ptr,  # int32[num_experts]        0: leave this expert out
    out_ptr,  # uint16[num_experts * expert_rows, cols], BF16 bits
    status_ptr,  # int32[num_tiles]          0, or a STATUS_* bit
    num_experts,  # int32
    expert_rows,  # int32
    cols,  # int32
    salt,  # int64                     of the seal
    low_bytes,  # int32                    0x00FF00FF, see `_four_weights`
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRMT: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least num_experts
):
    """Decode blocks of chosen experts; leave all others and the status words of their tiles alone.

    Grid (any number of programs,). The other sizes are those of `_fast_decode_kernel`, of all experts' rows.
    """
    expert = tl.arange(0, EXPERTS)
    chosen = tl.load(chosen_ptr + expert, mask=expert < num_experts, other=0)
    expert_rows = tl.full([], 0, tl.int32) + expert_rows
    across = (cols + TILES * TILE_COLS - 1) // (TILES * TILE_COLS)
    _first, down = _rows_of_expert(expert, expert_rows, ROWS)
    turns = tl.where(chosen != 0, down * across, 0)
    ends = tl.cumsum(turns, axis=0)
    total = tl.sum(turns, axis=0)
    pairs = ((expert + 1).to(tl.int64) << 32) | ends
    rows = num_experts * expert_rows
    turn = tl.program_id(0)
    while turn < total:  # the interpreter of Triton 3.6 takes no range of tensors
        # The experts before it, and their turns, in one number: the fewest exchanges between warps.
        before = tl.max(tl.where(ends <= turn, pairs, 0), axis=0)
        member, place = (before >> 32).to(tl.int32), turn - before.to(tl.int32)
        first, _count = _rows_of_expert(member, expert_rows, ROWS)
        _decode_block(
            desc_ptr, out_ptr, status_ptr, rows, cols, salt, low_bytes, (first + place // across) * ROWS,
            place % across * TILES, rows, ROWS, STEP, TILES, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
        )  # fmt: skip
        turn += tl.num_programs(0)


def decode_chosen(
    desc: torch.Tensor,
    num_experts: int,
    expert_rows: int,
    cols: int,
    chosen: torch.Tensor,
    out: torch.Tensor,
    status: torch.Tensor,
    programs: int = 0,
    *,
    prmt: bool | None = None,
) -> None:
    """Decode chosen experts of the tensor that `desc` describes; allocates nothing and does not wait for the device.

    Args:
        desc: int64 [4] on the device, made by this process; the payload is read only if its seal is right.
        num_experts, expert_rows, cols: shape of the tensor, whose rows lie one after the other.
        chosen: int32 [>= num_experts], 0 for those that are left out.
        out: BF16, flat, contiguous, aligned to 16 bytes.
        status: int32, a word per tile of 64 rows and 128 columns; 0, or a STATUS_* bit.
        programs: 0 for `chosen_programs` of configs.py.
        prmt: join bytes with PRMT; None: unless Triton interprets. The bits are the same.
    """
    rows = num_experts * expert_rows
    if rows * cols:
        constants = constants_of(rows, cols, out.device, prmt)
        across = triton.cdiv(cols, constants["TILES"] * fast_layout.TILE_COLS)
        down = triton.cdiv(expert_rows, constants["ROWS"]) + 1  # an expert may begin within a block
        most = programs or config_of(out.device).chosen_programs
        salt = descriptor.salt(desc.data_ptr(), fast_layout.size(rows, cols))
        _fast_chosen_kernel[(min(num_experts * down * across, most),)](
            desc, chosen, out.view(torch.uint16), status, num_experts, expert_rows, cols, salt, LOW_BYTES,
            EXPERTS=triton.next_power_of_2(num_experts), **constants,
        )  # fmt: skip
