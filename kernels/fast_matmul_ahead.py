"""The product with the fast layout on the tensor cores of one warp, for a few rows of activations.

A program is one warp with BN rows of weights. The loads of a turn are made one turn ahead, into registers, and waited
for at its top; what is loaded in a turn for its own use comes after the branches (fast_lane_escapes.py says why). As in
fast_matmul_dot.py the columns are put in an order in which each thread already holds what its tensor core wants of
them; here this is so for the activations too, so nothing is exchanged and there is no shared memory. The kernel also
makes the product in the order of the columns, with one warp or several (fast_matmul_in_order.py).
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _split_four
from vllm_dfloat.kernels.fast_lane_escapes import _fetch, _patch_by_lane
from vllm_dfloat.kernels.fast_matmul_dot import _as, _operand, _store_sums, _words
from vllm_dfloat.kernels.fast_matmul_in_order import _sum_in_order
from vllm_dfloat.kernels.fast_planes import _eight_weights, _open

_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)
_BLOCKS = tl.constexpr(fast_layout.TILE_COLS // 64)


@triton.jit
def _turn(low, high, step, IS_GPU: tl.constexpr):
    """Load the bytes and nibbles of turn `step`."""
    return _words(low, step * 32, IS_GPU, True), _words(high, step * 16, IS_GPU, True)


@triton.jit
def _activations(left, right, ROWS: tl.constexpr):
    """Return halves of each group, [blocks, ROWS, 4, 4] pairs, as BF16 [128, ROWS], columns in `_operand`'s order."""
    words = tl.join(left, right)  # [block, row, thread, (step % 2, half), step / 2]
    pairs = tl.join(words & 0xFFFF, words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    pairs = tl.reshape(pairs, [_BLOCKS, ROWS, 4, 2, 2, 2, 2])
    pairs = tl.permute(pairs, (0, 5, 3, 2, 4, 6, 1))
    return tl.reshape(pairs, [_BLOCKS * 64, ROWS])


@triton.jit
def _multiply(
    acc, a, b, c, d, e, f, g, h, x_ptr, cols, m, step, BN: tl.constexpr, OPERAND: tl.constexpr
):  # fmt: skip
    """Add the products of the words of each group with rows `m` of x to acc, FP32 [BN, ROWS]; x comes from a cache."""
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300
    weights = _operand(a, b, c, d, e, f, g, h, BN, _TILE_COLS, 1, 4)
    group = tl.arange(0, _BLOCKS)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    place = (m[None, :, None] * (cols // 2) + group * 8)[:, :, :, None]
    place += tl.arange(0, 4)[None, None, None, :]
    left = _words(x_ptr + place, step * 64, is_gpu)
    right = _words(x_ptr + place, step * 64 + 4, is_gpu)
    xs = _activations(left, right, m.shape[0])
    return tl.dot(_as(weights, OPERAND), _as(xs, OPERAND), acc)


@triton.jit
def _sum_ahead(
    acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes, first, rows, x_ptr, m, cols, begin, end,
    BN: tl.constexpr, FORM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add to acc, FP32 [BN, ROWS], the products of BN rows of the matrix, from row `first`, with rows `m` of x.

    low, high, starts_ptr, entries_ptr, base4, num_entries: from `_open`.
    first: a multiple of BN; int32. begin, end: tiles, side by side, whose columns are taken; int32.
    """
    prmt: tl.constexpr = FORM == _PERMUTED
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300  (a constexpr must be left of a dtype)
    row = tl.arange(0, BN)[None, :, None]
    group = tl.arange(0, _BLOCKS)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    # Rows beyond the last are the last once more; they are not stored.
    at = tl.minimum(first + row, rows - 1).to(tl.int64) * (cols // _GROUP) + group
    word = tl.arange(0, 4)[None, None, None, :]
    low = low.to(tl.pointer_type(tl.uint32)) + (at * 4)[:, :, :, None] + word
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    steps = cols // _TILE_COLS
    starts = starts_ptr + first // _TILE_ROWS * steps
    in_tile = (first % _TILE_ROWS + row) * _ROW_GROUPS + group
    if begin < end:
        low_words, codes = _turn(low, high, begin, is_gpu)
        entry = tl.load(starts + begin)
        stop = tl.load(starts + begin + 1)
        beyond = tl.load(starts + tl.minimum(begin + 2, steps))
        entry, stop = _bounded(entry, stop, num_entries)
        fetched = _fetch(entry, stop, entries_ptr, FORM)
        for step in tl.range(begin, end, num_stages=1):
            low0, low1, low2, low3 = _split_four(low_words)
            codes0, codes1 = tl.split(codes)
            a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
            e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
            # What the last turn loads ahead is not used. Where to load from depends on `beyond`, by a bit that is 0: so
            # all that the turn before has loaded is waited for here, not after these loads, and with them.
            ahead = step + 1 + (beyond >> 31).to(tl.int32)
            following = _turn(low, high, tl.minimum(ahead, end - 1), is_gpu)
            a, b, c, d, e, f, g, h = _patch_by_lane(
                a, b, c, d, e, f, g, h, in_tile, entry, stop, fetched, entries_ptr, BN, FORM
            )
            entry, stop = _bounded(stop.to(tl.uint32), beyond, num_entries)
            fetched = _fetch(entry, stop, entries_ptr, FORM)
            beyond = tl.load(starts + tl.minimum(step + 3, steps))
            acc = _multiply(acc, a, b, c, d, e, f, g, h, x_ptr, cols, m, step, BN, OPERAND)
            low_words, codes = following
    return acc


@triton.jit
def _no_sum(is_sound, ROWS: tl.constexpr, BN: tl.constexpr):
    """Return zeros to which products are added; NaN without a sound descriptor, as then nothing is added."""
    shape: tl.constexpr = [ROWS, BN] if BN == 8 else [BN, ROWS]
    return tl.zeros(shape, tl.float32) + tl.where(is_sound, 0.0, float("nan"))


@triton.jit(do_not_specialize=["salt", "low_bytes", "rows", "num_x"])
def _ahead_kernel(
    desc_ptr,  # int64[4], see codec/descriptor.py; num_entries and base as sizes
    x_ptr,  # uint32[num_x, cols / 2], pairs of BF16
    bias_ptr,  # bfloat16 or float32[rows], not read unless HAS_BIAS
    out_ptr,  # uint16[num_x, rows], BF16 bits; float32[parts, ROWS, rows] if HAS_PARTS
    salt,  # int64, of the seal
    low_bytes,  # int32, 0x00FF00FF, see fast_planes.py
    rows,  # int32
    cols,  # int32, a multiple of 128
    num_x,  # int32, 1 to ROWS
    ROWS: tl.constexpr,
    BN: tl.constexpr,  # 16; or 8, if in order, for ROWS of at least 16
    WARPS: tl.constexpr,  # 1; or 2 or 4, if in order, for cols of a multiple of so many tiles
    HAS_PARTS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which cannot multiply BF16
):
    """Grid (ceil(rows / BN), parts); in order the columns are not cut."""
    tl.static_assert(not (IN_ORDER and HAS_PARTS))
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, rows, cols
    )
    first = tl.program_id(0) * BN
    part = tl.program_id(1)
    m = tl.minimum(tl.arange(0, ROWS), num_x - 1)
    steps = cols // _TILE_COLS
    per_part = tl.cdiv(steps, tl.num_programs(1))
    begin = part * per_part
    end = tl.where(is_sound, tl.minimum(begin + per_part, steps), begin)
    acc = _no_sum(is_sound, ROWS, BN)
    if IN_ORDER:
        acc = _sum_in_order(
            acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes.to(tl.uint32),
            first, rows, x_ptr, m, cols, end, BN, WARPS, FORM, OPERAND,
        )  # fmt: skip
    else:
        acc = _sum_ahead(
            acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes.to(tl.uint32),
            first, rows, x_ptr, m, cols, begin, end, BN, FORM, OPERAND,
        )  # fmt: skip
    if BN == 8:
        acc = tl.trans(acc)
    row = first + tl.arange(0, BN)[:, None]
    m = tl.arange(0, ROWS)[None, :]
    _store_sums(acc, out_ptr, bias_ptr, row, m, part, rows, num_x, ROWS, HAS_PARTS, HAS_BIAS)
