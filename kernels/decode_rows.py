"""Decode chosen rows of a matrix in the packed layout: what an embedding looks up, and no more."""

import torch
import triton
import triton.language as tl

from vllm_dfloat import descriptor
from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.compile_spec import CompileSpec
from vllm_dfloat.kernels.tiles import (
    LANES,
    NAN_PAIR,
    STATUS_DESCRIPTOR,
    STEPS,
    TILE_WEIGHTS,
    _everywhere,
    _exponents_of_eight,
    _interleave,
    _merge,
    _open,
    _read,
    _section,
    _tile_status,
    num_warps,
)

TILES = 32 // layout.LANES  # a program is one warp


@triton.jit
def _store_part(out_ptr, tile, lane, step, pairs, first, cols, shift):
    """Store the weights of a step, two a word [TILES, LANES, 4], as far as they are in the row."""
    half = tl.arange(0, 2)[None, None, None, :]
    word = ((lane + step * LANES) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    weight = (tile * TILE_WEIGHTS)[:, :, None, None] + word[:, :, :, None] * 2 + half
    values = tl.join(pairs & 0xFFFF, pairs >> 16).to(tl.uint16)
    tl.store(out_ptr + shift + weight, values, mask=(weight >= first) & (weight < first + cols))


@triton.jit(do_not_specialize=["rows", "cols", "salt"])
def _decode_rows_kernel(
    desc_ptr,  # int64[4]                        see kernels/tiles.py
    ids_ptr,  # int64[num_ids]                  rows asked for
    out_ptr,  # uint16[num_ids, cols]           BF16 bits
    status_ptr,  # int32[num_ids, statuses_per_row]    0, or a sum of STATUS_* bits; or None
    rows,  # int32
    cols,  # int32
    salt,  # int64                           of the seal, see vllm_dfloat/descriptor.py
    TILES: tl.constexpr,
):
    """Decode TILES of the tiles that one chosen row touches, and store the part of them that is the row's.

    Equal bit for bit to those rows of `vllm_dfloat.codec.reference.decode`. Grid (num_ids, statuses_per_row / TILES).
    An id outside the matrix reads the nearest row: vLLM masks such ids out afterwards.
    """
    num_tiles = (rows.to(tl.int64) * cols + TILE_WEIGHTS - 1) // TILE_WEIGHTS
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)  # times cols it can pass 2**31
    row = tl.minimum(tl.maximum(row, 0), rows - 1)
    first = row * cols
    place = (tl.program_id(1) * TILES + tl.arange(0, TILES))[:, None]
    wanted = first // TILE_WEIGHTS + place
    is_touched = wanted * TILE_WEIGHTS < first + cols
    status = tl.zeros([TILES, 1], tl.int32)
    if tl.max(is_touched.to(tl.int32)) != 0:
        tile = tl.minimum(wanted, num_tiles - 1)
        lane = tl.arange(0, LANES)[None, :]
        # Where weight 0 of the matrix would lie in the output.
        shift = tl.program_id(0).to(tl.int64) * cols - first
        is_sound, payload, kind, sizes = _read(desc_ptr, salt)
        if is_sound & (kind == 0):
            lut, turn, plane, words, is_full, end, bit, word0, word1 = _open(
                payload, sizes, tile, num_tiles
            )
            for step in range(STEPS):
                offset = (lane + (step // 2) * LANES) * 4 + (step % 2) * 2
                e0, e1, e2, e3, bit, word0, word1 = _exponents_of_eight(
                    words, bit, word0, word1, lut, turn
                )
                a, b = _merge(tl.load(plane + offset), e0, e1)
                c, d = _merge(tl.load(plane + offset + 1), e2, e3)
                pairs = _interleave(a, b, c, d)
                _store_part(out_ptr, tile, lane, step, pairs, first, cols, shift)
            status = tl.where(is_touched, _tile_status(bit, end, is_full), 0)
        else:
            quad = tl.arange(0, 4)[None, None, :]
            raw = _section(payload, 0, tl.uint32) + (tile * (TILE_WEIGHTS // 2))[:, :, None]
            is_there = _everywhere(tile, is_sound)[:, :, None]
            for step in range(STEPS):
                pairs = raw + ((lane + step * LANES) * 4)[:, :, None] + quad
                pairs = tl.load(pairs, mask=is_there, other=NAN_PAIR)
                _store_part(out_ptr, tile, lane, step, pairs, first, cols, shift)
            status = tl.where(is_touched & ~is_sound, STATUS_DESCRIPTOR, 0)
    if status_ptr is not None:
        per_row = tl.num_programs(1) * TILES
        tl.store(status_ptr + tl.program_id(0).to(tl.int64) * per_row + place, status)


def statuses_per_row(cols: int) -> int:
    """Return the status words of a row of `cols` weights: the tiles it touches at most, in whole programs.

    A row starts anywhere in its first tile.
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
    """Decode chosen rows of the matrix [rows, cols] that `desc` describes; allocates nothing and waits for nothing.

    Args:
        desc: int64 [4] on the device; the payload it points to was validated when it was made.
        ids: int64 [n], the rows.
        rows, cols: shape of the matrix.
        out: BF16 [n, cols], contiguous.
        status: int32 [n, statuses_per_row(cols)], contiguous; 0 or a sum of STATUS_* bits. None: not wanted.
    """
    if out.numel():
        salt = descriptor.salt(desc.data_ptr(), triton.cdiv(rows * cols, layout.TILE_WEIGHTS))
        _decode_rows_kernel[(ids.numel(), statuses_per_row(cols) // TILES)](
            desc,
            ids,
            out.view(torch.uint16),
            status,
            rows,
            cols,
            salt,
            TILES,
            num_warps=num_warps(TILES),
        )


COMPILE_SPECS = [
    CompileSpec(
        name=name,
        fn=_decode_rows_kernel,
        signature={
            "desc_ptr": "*i64",
            "ids_ptr": "*i32",  # what vLLM passes on a GPU
            "out_ptr": "*u16",
            "status_ptr": status_type,
            "rows": "i32",
            "cols": "i32",
            "salt": "i64",
            "TILES": "constexpr",
        },
        constexprs={"TILES": TILES, **absent},
        aligned_args=("desc_ptr", "ids_ptr", "out_ptr"),
        num_warps=num_warps(TILES),
        weights_per_program=TILES * layout.TILE_WEIGHTS,
        loop_runs=layout.STEPS,
    )
    for name, status_type, absent in (
        ("decode_rows", "constexpr", {"status_ptr": None}),
        ("decode_rows_status", "*i32", {}),
    )
]
