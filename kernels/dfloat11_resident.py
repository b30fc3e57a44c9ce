"""Decode a matrix held in the official DFloat11 layout, one block of 4096 stream bytes at a time (dfloat11_block.py).

Three kernels decode a resident matrix, held in this layout while a model is served: the whole matrix, a run of its
weights, or chosen rows. They take a descriptor, for the reasons given in tiles.py. It points to one payload; each of
its sections starts on a multiple of 16 bytes:

    desc  int64[4]  address of the payload, kind (0 coded, 1 raw BF16), bytes of the stream and number of tables, seal

    tables         int32[num_tables, 256]
    positions      int64[num_blocks + 1]
    gaps           uint8[320 * num_blocks]
    sign_mantissa  uint8[num_weights]
    stream         uint8[num_bytes]

or the BF16 bits themselves. The number of blocks depends on the weights, but the size of a launch must not. A matrix is
coded only if its stream takes at most one byte per weight, so one program per 4096 weights is always enough; most
programs find nothing to do.

No payload is read unless the seal of its descriptor is right. If it is wrong, every weight is NaN (kernels/tiles.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, layout
from vllm_dfloat.dfloat11.format import BLOCK_BYTES, BLOCK_GAP_BYTES, MIN_BLOCK_WEIGHTS
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.dfloat11_block import decode_block
from vllm_dfloat.kernels.tiles import STATUS_DESCRIPTOR, _everywhere, _read, _section

PROGRAM_WEIGHTS = BLOCK_BYTES  # weights per program of a launch; it copies as many if they are raw
_BLOCK_BYTES = tl.constexpr(BLOCK_BYTES)
_BLOCK_GAP_BYTES = tl.constexpr(BLOCK_GAP_BYTES)
_PROGRAM_WEIGHTS = tl.constexpr(PROGRAM_WEIGHTS)
_TILE_WEIGHTS = tl.constexpr(layout.TILE_WEIGHTS)
_ROW_PART = tl.constexpr(1024)  # weights of a raw row that one program copies; >= MIN_BLOCK_WEIGHTS
_NAN = tl.constexpr(0x7FC0)
_SEARCH_STEPS = tl.constexpr(19)  # a stream of less than 2**31 bytes has at most 2**19 blocks
_FIRST_STEP = tl.constexpr(1 << 18)


@triton.jit
def _sections(payload, num_weights, num_bytes, num_tables):
    """Return pointers to stream, sign_mantissa, tables, positions and gaps, and the number of blocks."""
    num_blocks = (num_bytes + _BLOCK_BYTES - 1) // _BLOCK_BYTES
    positions = num_tables * 1024
    gaps = positions + (num_blocks * 8 + 8 + 15) // 16 * 16
    sign_mantissa = gaps + num_blocks * _BLOCK_GAP_BYTES
    stream = sign_mantissa + (num_weights + 15) // 16 * 16
    return (
        _section(payload, stream, tl.uint8),
        _section(payload, sign_mantissa, tl.uint8),
        _section(payload, 0, tl.int32),
        _section(payload, positions, tl.int64),
        _section(payload, gaps, tl.uint8),
        num_blocks,
    )


@triton.jit
def _block_at(positions, num_blocks, num_weights, weight):
    """Return the last block that begins at or before a weight, by binary search."""
    block = tl.zeros([], tl.int64)
    for i in tl.static_range(_SEARCH_STEPS):
        ahead = block + (_FIRST_STEP >> i)
        begin = tl.load(positions + ahead, mask=ahead < num_blocks, other=num_weights)
        block = tl.where(begin <= weight, ahead, block)
    return block


@triton.jit(do_not_specialize=["num_weights", "salt"])
def _decode_resident_kernel(
    desc_ptr,  # int64[4]                       see above
    out_ptr,  # int16[num_weights]              BF16 bits
    status_ptr,  # int32[num_tiles]             word b: status of block b; others: of the descriptor
    num_weights,
    salt,  # int64                              of the seal, see vllm_dfloat/codec/descriptor.py
):
    """Decode one block of a resident matrix per program, or copy 4096 weights of a matrix held as BF16.

    Grid (ceil(num_weights / 4096),): at least the number of blocks, and at least half the number of tiles.
    """
    is_sound, payload, kind, sizes = _read(desc_ptr, salt)
    program = tl.program_id(0).to(tl.int64)
    num_weights = num_weights.to(tl.int64)
    spare = tl.num_programs(0) + program
    num_tiles = (num_weights + _TILE_WEIGHTS - 1) // _TILE_WEIGHTS
    status = tl.where(is_sound, 0, STATUS_DESCRIPTOR)
    tl.store(status_ptr + spare, status, mask=spare < num_tiles)
    if (kind != 0) | ~is_sound:
        at = program * _PROGRAM_WEIGHTS + tl.arange(0, _PROGRAM_WEIGHTS)
        inside = at < num_weights
        raw, is_there = _section(payload, 0, tl.int16), inside & _everywhere(at, is_sound)
        tl.store(out_ptr + at, tl.load(raw + at, mask=is_there, other=_NAN), mask=inside)
        tl.store(status_ptr + program, status)
    else:
        num_bytes = sizes & 0xFFFFFFFF
        num_tables = (sizes >> 32).to(tl.int32)
        stream, sign_mantissa, tables, positions, gaps, num_blocks = _sections(
            payload, num_weights, num_bytes, num_tables
        )
        if program < num_blocks:
            decode_block(
                stream, sign_mantissa, tables, positions, gaps, out_ptr, status_ptr,
                num_bytes, num_weights, num_blocks, num_tables, program, 0, num_weights,
            )  # fmt: skip
        else:
            tl.store(status_ptr + program, 0)


@triton.jit
def _decode_span(is_sound, payload, kind, sizes, out_ptr, num_weights, first, end, part):
    """Decode the part-th block that the weights first to end - 1 touch; weight i of the matrix goes to out_ptr + i."""
    if (kind != 0) | ~is_sound:
        at = first + part * _ROW_PART + tl.arange(0, _ROW_PART)
        inside = at < end
        raw, is_there = _section(payload, 0, tl.int16), inside & _everywhere(at, is_sound)
        tl.store(out_ptr + at, tl.load(raw + at, mask=is_there, other=_NAN), mask=inside)
    else:
        num_bytes = sizes & 0xFFFFFFFF
        num_tables = (sizes >> 32).to(tl.int32)
        stream, sign_mantissa, tables, positions, gaps, num_blocks = _sections(
            payload, num_weights, num_bytes, num_tables
        )
        block = _block_at(positions, num_blocks, num_weights, first) + part
        begin = tl.load(positions + block, mask=block < num_blocks, other=num_weights)
        if begin < end:
            decode_block(
                stream, sign_mantissa, tables, positions, gaps, out_ptr, None,
                num_bytes, num_weights, num_blocks, num_tables, block, first, end,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_weights", "first", "end", "salt"])
def _decode_resident_run_kernel(
    desc_ptr,  # int64[4]                       see above
    out_ptr,  # int16[end - first]              BF16 bits
    num_weights,  # of the matrix
    first,
    end,
    salt,  # int64                              of the seal, see vllm_dfloat/codec/descriptor.py
):
    """Decode one block that the weights first to end - 1 touch, and store those of its weights that are among them.

    Grid (blocks that so many weights can touch,); a program copies _ROW_PART weights of a matrix held as BF16.
    """
    is_sound, payload, kind, sizes = _read(desc_ptr, salt)
    program = tl.program_id(0).to(tl.int64)
    num_weights, first, end = num_weights.to(tl.int64), first.to(tl.int64), end.to(tl.int64)
    out_ptr -= first  # weight i of the matrix goes to out_ptr + i
    _decode_span(is_sound, payload, kind, sizes, out_ptr, num_weights, first, end, program)


@triton.jit(do_not_specialize=["rows", "cols", "parts", "salt"])
def _decode_resident_rows_kernel(
    desc_ptr,  # int64[4]                       see above
    ids_ptr,  # int32 or int64[num_ids]         the chosen rows
    out_ptr,  # int16[num_ids, cols]            BF16 bits
    rows,
    cols,
    parts,  # largest number of blocks that a row can touch
    salt,  # int64                              of the seal, see vllm_dfloat/codec/descriptor.py
):
    """Decode one block that one chosen row touches, and store the row's weights of it.

    Grid (num_ids * parts,). An id outside the matrix reads the nearest row: vLLM masks such ids out
    afterwards.
    """
    is_sound, payload, kind, sizes = _read(desc_ptr, salt)
    number = tl.program_id(0) // parts  # index of the row in ids
    part = tl.program_id(0) % parts
    row = tl.minimum(tl.maximum(tl.load(ids_ptr + number).to(tl.int64), 0), rows - 1)
    first = row * cols
    end = first + cols
    # Where weight 0 of the matrix would be in the output, so that weight i of the matrix goes to out_ptr + i.
    out_ptr += number.to(tl.int64) * cols - first
    num_weights = rows.to(tl.int64) * cols
    _decode_span(is_sound, payload, kind, sizes, out_ptr, num_weights, first, end, part)


def decode_resident(
    desc: torch.Tensor, num_weights: int, out: torch.Tensor, status: torch.Tensor
) -> None:
    """Decode the matrix that `desc` describes into `out`; allocates nothing and does not wait for the device.

    Args:
        desc: int64 [4] on the device; device/unit_resident.py made the payload that it points to.
        num_weights: rows times columns.
        out: BF16, flat, contiguous, at least `num_weights` elements, aligned to 16 bytes.
        status: int32, at least one word per 2048 weights; word b becomes that of block b, all others 0. All become
            STATUS_DESCRIPTOR if the seal is wrong.
    """
    if num_weights:
        warps = config_of(out.device).dfloat11_num_warps
        salt = descriptor.salt(desc.data_ptr(), -num_weights)
        _decode_resident_kernel[(triton.cdiv(num_weights, PROGRAM_WEIGHTS),)](
            desc, out.view(torch.int16), status, num_weights, salt, num_warps=warps
        )


def decode_resident_run(
    desc: torch.Tensor, num_weights: int, first: int, count: int, out: torch.Tensor
) -> None:
    """Decode `count` weights of the matrix that `desc` describes, from weight `first` on, into the beginning of `out`.

    Args:
        num_weights: of the whole matrix; first + count is at most that.
        desc, out: as for `decode_resident`, which waits and allocates as little. No status is told.
    """
    if count:
        # A run may begin with the last weight of one block and end with the first weight of another.
        programs = triton.cdiv(count, MIN_BLOCK_WEIGHTS) + 1
        warps = config_of(out.device).dfloat11_num_warps
        salt = descriptor.salt(desc.data_ptr(), -num_weights)
        _decode_resident_run_kernel[(programs,)](
            desc, out.view(torch.int16), num_weights, first, first + count, salt, num_warps=warps
        )


def decode_resident_rows(
    desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int, out: torch.Tensor
) -> None:
    """Decode rows `ids` (int32 or int64 [n]) of the matrix that `desc` describes into `out`, BF16 [n, cols]."""
    if out.numel():
        # A row may begin with the last weight of one block and end with the first weight of another.
        parts = cols // MIN_BLOCK_WEIGHTS + 2
        warps = config_of(out.device).dfloat11_num_warps
        salt = descriptor.salt(desc.data_ptr(), -rows * cols)
        _decode_resident_rows_kernel[(ids.numel() * parts,)](  # one axis: the others end at 65,535
            desc, ids, out.view(torch.int16), rows, cols, parts, salt, num_warps=warps
        )
