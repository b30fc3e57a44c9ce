"""Shared by the kernels that decode a group of matrices in one launch: the table that says which, and their places.

The size and the content of the table do not change when the weights do:

    table  int64[num_members + 1, 4]  per matrix: address of its descriptor, its first tile in the output, a word of its
                                      layout, seal of the row; in the last row: 0, number of tiles, 0, seal

The addresses are those of descriptors (kernels/tiles.py), not of payloads. A reload rewrites descriptors in place, so a
CUDA graph captured before it sees the new weights. A tile of the output has 2048 weights, whatever the layout.

Every program checks the seals of all rows before it follows an address: one wrong first tile would move the other
matrices. If a seal is wrong, the whole output becomes NaN.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor
from vllm_dfloat.kernels.tiles import ADDRESS_FACTOR, KIND_FACTOR, ROW_FACTOR, SIZES_FACTOR

WORDS = tl.constexpr(descriptor.ROW_WORDS)
_ROWS = tl.constexpr(2 * descriptor.MAX_MEMBERS)  # a power of two, with room for the last row


@triton.jit
def _open_table(table_ptr, num_members, salt):
    """Return whether the table is sound, the numbers of its rows, which of them are members, and of each member the
    address of its descriptor, its first tile in the output, the one after its last, and the word of its layout.

    They may be used only if the table is sound.
    """
    index = tl.arange(0, _ROWS)
    row = table_ptr + index * WORDS
    is_member = index < num_members
    is_row = index <= num_members
    address = tl.load(row, mask=is_row, other=0)
    first = tl.load(row + 1, mask=is_row, other=0)
    word = tl.load(row + 2, mask=is_row, other=0)
    seal = tl.load(row + 3, mask=is_row, other=0)
    found = address * ADDRESS_FACTOR + first * KIND_FACTOR + word * SIZES_FACTOR
    found += index.to(tl.int64) * ROW_FACTOR + salt
    is_sound = tl.max((is_row & (found != seal)).to(tl.int32), axis=0) == 0
    first = first.to(tl.int32)
    after = tl.load(row + (WORDS + 1), mask=is_member, other=0).to(tl.int32)
    return is_sound, index, is_member, address, first, after, word


@triton.jit
def _member_of_program(programs, is_member):
    """Return the member that this program works for, and the program's index within it.

    A program works for one member, so each member gets whole programs. Surplus programs get number num_members.

    programs: of each member.
    """
    ends = tl.cumsum(programs, axis=0)
    pid = tl.program_id(0)
    is_before = is_member & (ends <= pid)
    member = tl.sum(is_before.to(tl.int32), axis=0)
    return member, pid - tl.sum(tl.where(is_before, programs, 0), axis=0)
