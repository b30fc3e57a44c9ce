"""Decode chosen rows of a matrix in the packed layout, for embedding look-ups."""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, layout
from vllm_dfloat.kernels.configs import ROWS_TILES_PER_PROGRAM as TILES
from vllm_dfloat.kernels.tiles import (
    LANES,
    NAN_PAIR,
    STATUS_DESCRIPTOR,
    STEPS,
    TILE_WEIGHTS,
    _everywhere,
    _exponents_of_eight,
    _merge,
    _open,
    _read,
    _section,
    _tile_status,
    num_warps,
)

STEP_WEIGHTS = tl.constexpr(layout.STEP_WEIGHTS)


@triton.jit
def _store_part(out_ptr, tile, lane, step, words, first, cols, shift):
    """Store those of the 8 weights of a step, four words [TILES, LANES], that are in the row.

    Each weight is stored by itself: one store of all would move them through shared memory to other threads.
    """
    weight = tile * TILE_WEIGHTS + (lane + step * LANES) * STEP_WEIGHTS
    for j in tl.static_range(8):
        value = (words[j // 2] >> (16 * (j % 2))).to(tl.uint16)
        at = weight + j
        tl.store(out_ptr + shift + at, value, mask=(at >= first) & (at < first + cols))


@triton.jit(do_not_specialize=["rows", "cols", "parts", "salt"])
def _decode_rows_kernel(
    desc_ptr,  # int64[4]                        see kernels/tiles.py
    ids_ptr,  # int64[num_ids]                  the chosen rows
    out_ptr,  # uint16[num_ids, cols]           BF16 bits
    status_ptr,  # int32[num_ids, statuses_per_row]    0, or a sum of STATUS_* bits; or None
    rows,  # int32
    cols,  # int32
    parts,  # int32                          programs per row, statuses_per_row / TILES
    salt,  # int64                           of the seal, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
):
    """Decode TILES of the tiles that one chosen row touches, and store the row's weights of them.

    Equal bit for bit to those rows of `vllm_dfloat.codec.reference.decode`. Grid (num_ids * parts,).
    An id outside the matrix reads the nearest row: vLLM masks such ids out afterwards.
    """
    num_tiles = (rows.to(tl.int64) * cols + TILE_WEIGHTS - 1) // TILE_WEIGHTS
    number = tl.program_id(0) // parts  # index of the row in ids
    part = tl.program_id(0) % parts
    row = tl.load(ids_ptr + number).to(tl.int64)  # times cols it can pass 2**31
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    first = row * cols
    place = (part * TILES + tl.arange(0, TILES))[:, None]
    wanted = first // TILE_WEIGHTS + place
    is_touched = wanted * TILE_WEIGHTS < first + cols
    status = tl.zeros([TILES, 1], tl.int32)
    if tl.max(is_touched.to(tl.int32)) != 0:
        tile = tl.minimum(wanted, num_tiles - 1)
        lane = tl.arange(0, LANES)[None, :]
        # Where weight 0 of the matrix would be in the output.
        shift = number.to(tl.int64) * cols - first
        is_sound, payload, kind, sizes = _read(desc_ptr, salt)
        if is_sound & (kind == 0):
            lut, turn, plane, words, is_full, end, bit, word0, word1, word2 = _open(
                payload, sizes, tile, num_tiles
            )
            for step in range(STEPS):
                offset = (lane + (step // 2) * LANES) * 4 + (step % 2) * 2
                e0, e1, e2, e3, bit, word0, word1, word2 = _exponents_of_eight(
                    words, bit, word0, word1, word2, lut, turn
                )
                a, b = _merge(tl.load(plane + offset), e0, e1)
                c, d = _merge(tl.load(plane + offset + 1), e2, e3)
                _store_part(out_ptr, tile, lane, step, (a, b, c, d), first, cols, shift)
            status = tl.where(is_touched, _tile_status(bit, end, is_full), 0)
        else:
            raw = _section(payload, 0, tl.uint32) + tile * (TILE_WEIGHTS // 2)
            is_there = _everywhere(tile, is_sound)
            for step in range(STEPS):
                at = raw + (lane + step * LANES) * 4
                a = tl.load(at, mask=is_there, other=NAN_PAIR)
                b = tl.load(at + 1, mask=is_there, other=NAN_PAIR)
                c = tl.load(at + 2, mask=is_there, other=NAN_PAIR)
                d = tl.load(at + 3, mask=is_there, other=NAN_PAIR)
                _store_part(out_ptr, tile, lane, step, (a, b, c, d), first, cols, shift)
            status = tl.where(is_touched & ~is_sound, STATUS_DESCRIPTOR, 0)
    if status_ptr is not None:
        tl.store(status_ptr + number.to(tl.int64) * (parts * TILES) + place, status)


def statuses_per_row(cols: int) -> int:
    """Return the status words per row of `cols` weights: the most tiles that it can touch, rounded up to programs.

    A row may start anywhere in its first tile.
    """
    touched = (cols - 2) // layout.TILE_WEIGHTS + 2 if cols > 1 else 1
    return -(-touched // TILES) * TILES


def decode_rows(
    desc: torch.Tensor,
    ids: torch.Tensor,
    rows: int,
    cols: int,
    out: torch.Tensor,
    status: torch.Tensor | None = None,
) -> None:
    """Decode chosen rows of the matrix [rows, cols] that `desc` describes; allocates nothing, waits for nothing.

    Args:
        desc: int64 [4] on the device, made by this process; the payload is read only if its seal is right.
        ids: int64 [n], the rows.
        rows, cols: shape of the matrix.
        out: BF16 [n, cols], contiguous.
        status: int32 [n, statuses_per_row(cols)], contiguous; 0 or a sum of STATUS_* bits. None: not wanted.
    """
    if out.numel():
        salt = descriptor.salt(desc.data_ptr(), triton.cdiv(rows * cols, layout.TILE_WEIGHTS))
        parts = statuses_per_row(cols) // TILES
        _decode_rows_kernel[(ids.numel() * parts,)](  # one axis: the others end at 65,535
            desc,
            ids,
            out.view(torch.uint16),
            status,
            rows,
            cols,
            parts,
            salt,
            TILES,
            num_warps=num_warps(TILES),
        )
