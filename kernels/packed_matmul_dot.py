"""The fused multiplication for up to 32 rows of activations: decoded tiles go to the tensor cores.

A program decodes TILES tiles (16 by default) that start at the same column of different rows, so that one slice of the
activations serves all of them: each step multiplies TILES rows of weights by 128 columns.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import layout
from vllm_dfloat.kernels.packed_matmul_parts import _store_sums, _wrap
from vllm_dfloat.kernels.tiles import (
    LANES,
    STATUS_DESCRIPTOR,
    STEPS,
    TILE_WEIGHTS,
    _exponents_of_eight,
    _four_words,
    _interleave,
    _merge,
    _open,
    _read,
    _section,
    _tile_status,
)

STEP_WEIGHTS = tl.constexpr(layout.STEP_WEIGHTS)
STEP_COLUMNS = tl.constexpr(layout.LANES * layout.STEP_WEIGHTS)  # weights of a tile in one step


@triton.jit
def _matrix(four, TILES: tl.constexpr, OPERAND: tl.constexpr):
    """Return the weights of a step, given as [TILES, LANES, 4] words of two weights, as [TILES, 128]."""
    pairs = tl.join(four & 0xFFFF, four >> 16).to(tl.uint16)
    return tl.reshape(pairs, [TILES, STEP_COLUMNS]).to(tl.bfloat16, bitcast=True).to(OPERAND)


@triton.jit
def _add_segment(acc, weights, x, at):
    """Add the products of the columns where `at` [128] is true.

    Both factors are set to 0 elsewhere: 0 times infinity is NaN, which would reach a row that it does not belong to.
    """
    zero = tl.zeros([1, 1], weights.dtype)
    return tl.dot(tl.where(at[None, :], weights, zero), tl.where(at[:, None], x, zero), acc)


@triton.jit
def _add_step(
    acc0, acc1, acc2, acc3, weights, x_ptr, offset, cols, num_x, ROWS: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """Add weights [TILES, 128] times their columns of x to the accumulators [TILES, ROWS] of the segments.

    offset: int32 [16], columns counted from the start of the tiles' first rows; offset and cols are in units of 8.
    """
    row = tl.arange(0, ROWS)[None, None, :]
    column, segment = _wrap(offset, cols, SEGMENTS)
    eight = tl.arange(0, STEP_WEIGHTS)[None, :, None]
    at = ((column[:, None, None] + row * cols) * STEP_WEIGHTS) + eight
    x = tl.load(x_ptr + at, mask=row < num_x, other=0.0)
    x = tl.reshape(x, [STEP_COLUMNS, ROWS]).to(weights.dtype)
    if SEGMENTS == 1:
        acc0 = tl.dot(weights, x, acc0)
    else:
        eights = tl.zeros([LANES, STEP_WEIGHTS], tl.int32)
        segment = tl.reshape(segment[:, None] + eights, [STEP_COLUMNS])
        acc0 = _add_segment(acc0, weights, x, segment == 0)
        acc1 = _add_segment(acc1, weights, x, segment == 1)
        if SEGMENTS > 2:
            acc2 = _add_segment(acc2, weights, x, segment == 2)
        if SEGMENTS > 3:
            acc3 = _add_segment(acc3, weights, x, segment == 3)
    return acc0, acc1, acc2, acc3


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_tiles", "cols", "num_x", "period", "salt"])
def _dot_kernel(
    desc_ptr,  # int64[4]                              see kernels/tiles.py
    x_ptr,  # bfloat16[num_x, cols]                 activations
    part_ptr,  # float32[num_tiles, SEGMENTS, ROWS]    partial sums
    status_ptr,  # int32[num_tiles]                      0, or a sum of STATUS_* bits
    num_tiles,  # int32
    cols,  # int32                                  a multiple of 8
    num_x,  # int32                                  rows of x, 1 to ROWS
    period,  # int32                                  distance in tiles of two that start at the same column
    salt,  # int64                                  of the seal, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which cannot multiply BF16
):
    """Multiply TILES tiles per program by up to ROWS (16 or 32) rows of x.

    Grid (period * ceil(num_tiles / period / TILES),); the starting column varies fastest.
    """
    num_tiles = num_tiles.to(tl.int64)
    first = tl.program_id(0) % period
    place = (tl.program_id(0) // period).to(tl.int64) * TILES + tl.arange(0, TILES)
    wanted = (place * period + first)[:, None]
    tile = tl.minimum(wanted, num_tiles - 1)
    lane = tl.arange(0, LANES)[None, :]
    quad = tl.arange(0, 4)[None, None, :]
    cols = (
        cols // STEP_WEIGHTS
    )  # columns are counted in eights, so that the compiler sees aligned loads
    start = (first.to(tl.int64) * (TILE_WEIGHTS // STEP_WEIGHTS)) % cols
    columns = start.to(tl.int32) + tl.arange(0, LANES)
    acc0 = tl.zeros([TILES, ROWS], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    is_sound, payload, kind, sizes = _read(desc_ptr, salt)
    if is_sound & (kind == 0):
        lut, shift, plane, words, is_full, end, bit, word0, word1, word2 = _open(
            payload, sizes, tile, num_tiles
        )
        for half in range(STEPS // 2):
            signs = plane[:, :, None] + ((lane + half * LANES) * 4)[:, :, None]
            sm0, sm1, sm2, sm3 = _four_words(signs, TILES)
            for k in tl.static_range(2):
                e0, e1, e2, e3, bit, word0, word1, word2 = _exponents_of_eight(
                    words, bit, word0, word1, word2, lut, shift
                )
                a, b = _merge(sm0 if k == 0 else sm2, e0, e1)
                c, d = _merge(sm1 if k == 0 else sm3, e2, e3)
                weights = _matrix(_interleave(a, b, c, d), TILES, OPERAND)
                acc0, acc1, acc2, acc3 = _add_step(
                    acc0, acc1, acc2, acc3, weights, x_ptr,
                    columns + (half * 2 + k) * LANES, cols, num_x, ROWS, SEGMENTS,
                )  # fmt: skip
        tl.store(status_ptr + tile, _tile_status(bit, end, is_full))
    elif is_sound:
        raw = _section(payload, 0, tl.uint32) + (tile * (TILE_WEIGHTS // 2))[:, :, None]
        for half in range(STEPS // 2):
            for k in tl.static_range(2):
                step = half * 2 + k
                four = tl.load(raw + ((lane + step * LANES) * 4)[:, :, None] + quad)
                acc0, acc1, acc2, acc3 = _add_step(
                    acc0, acc1, acc2, acc3, _matrix(four, TILES, OPERAND), x_ptr, columns + step * LANES,
                    cols, num_x, ROWS, SEGMENTS,
                )  # fmt: skip
        tl.store(status_ptr + tile, tl.zeros_like(tile).to(tl.int32))
    else:
        acc0 += float("nan")  # in every row that any of the tiles touches
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        tl.store(status_ptr + tile, tl.zeros_like(tile).to(tl.int32) + STATUS_DESCRIPTOR)
    exists = wanted < num_tiles
    _store_sums(part_ptr, tile, exists, acc0, 0, ROWS, SEGMENTS)
    if SEGMENTS > 1:
        _store_sums(part_ptr, tile, exists, acc1, 1, ROWS, SEGMENTS)
    if SEGMENTS > 2:
        _store_sums(part_ptr, tile, exists, acc2, 2, ROWS, SEGMENTS)
    if SEGMENTS > 3:
        _store_sums(part_ptr, tile, exists, acc3, 3, ROWS, SEGMENTS)
