"""The product with the fast layout for matrices of many rows, loaded ahead, in the order of the columns.

A program has a band of 16 rows of weights for each of its warps. The activations of a turn are loaded once for all
bands, into shared memory, so that reading them takes no longer than reading the weights. A warp's weights go through
shared memory too, 16 bytes at a time, and from there to the tensor cores of the warp, not to those of a warp group: so
each step takes the next 16 columns, and no fence waits for what is loaded ahead.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _split_four
from vllm_dfloat.kernels.fast_lane_escapes import _fetch, _patch_by_lane
from vllm_dfloat.kernels.fast_matmul_dot import _as, _store_sums, _words
from vllm_dfloat.kernels.fast_matmul_in_order import _of_groups, _start, _weights_of_groups
from vllm_dfloat.kernels.fast_planes import _eight_weights, _open

BAND = 16  # rows of weights of a warp
_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)
_BLOCK = tl.constexpr(64)
_BLOCKS = tl.constexpr(fast_layout.TILE_COLS // 64)
_BAND = tl.constexpr(BAND)


@triton.jit
def _split_blocks(words, WARPS: tl.constexpr):
    """Split words [(8 rows of a band, block, warp), row, group] into those of either block, [(8 rows, warp), ...]."""
    words = tl.reshape(words, [_BAND // 8, _BLOCKS, WARPS, 8, 4])
    left, right = tl.split(tl.permute(words, (0, 2, 3, 4, 1)))
    shape: tl.constexpr = [_BAND // 8 * WARPS, 8, 4]
    return tl.reshape(left, shape), tl.reshape(right, shape)


@triton.jit
def _bands(a, b, c, d, e, f, g, h, WARPS: tl.constexpr):
    """Return the words of each group, [(8 rows of a band, block, warp), row, group], as BF16 [WARPS, 16, columns]."""
    BLOCKS: tl.constexpr = a.shape[0] // (_BAND // 8 * WARPS)
    weights = _weights_of_groups(a, b, c, d, e, f, g, h)
    weights = tl.reshape(weights, [_BAND // 8, BLOCKS, WARPS, 8, 4, 16])
    return tl.reshape(tl.permute(weights, (2, 0, 3, 1, 4, 5)), [WARPS, _BAND, BLOCKS * _BLOCK])


@triton.jit
def _add(acc, weights, x, OPERAND: tl.constexpr):
    """Add the products of weights, BF16 [WARPS, 16, columns], with activations to acc, FP32 [WARPS, 16, ROWS].

    x: pointers [1, columns, ROWS]; so Triton has one copy of them in shared memory for all warps.
    """
    shape: tl.constexpr = [acc.shape[0], weights.shape[2], acc.shape[2]]
    xs = tl.broadcast_to(_as(tl.load(x), OPERAND), shape)
    return tl.dot(_as(weights, OPERAND), xs, acc)


@triton.jit
def _add_turn(acc, a, b, c, d, e, f, g, h, x, OPERAND: tl.constexpr):
    """Add the products of all words of a turn; with many rows of activations by blocks, which takes fewer registers."""
    WARPS: tl.constexpr = acc.shape[0]
    if x.shape[1] == _TILE_COLS:
        acc = _add(acc, _bands(a, b, c, d, e, f, g, h, WARPS), x, OPERAND)
    else:
        a, a_2 = _split_blocks(a, WARPS)
        b, b_2 = _split_blocks(b, WARPS)
        c, c_2 = _split_blocks(c, WARPS)
        d, d_2 = _split_blocks(d, WARPS)
        e, e_2 = _split_blocks(e, WARPS)
        f, f_2 = _split_blocks(f, WARPS)
        g, g_2 = _split_blocks(g, WARPS)
        h, h_2 = _split_blocks(h, WARPS)
        acc = _add(acc, _bands(a, b, c, d, e, f, g, h, WARPS), x, OPERAND)
        second = _bands(a_2, b_2, c_2, d_2, e_2, f_2, g_2, h_2, WARPS)
        acc = _add(acc, second, x + _BLOCK, OPERAND)
    return acc


@triton.jit
def _sum_bands(
    acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes, first, rows, x_ptr, m, cols, begin, end,
    FORM: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add to acc, FP32 [WARPS, 16, ROWS], the products of the rows from row `first` on with rows `m` of x.

    low, high, starts_ptr, entries_ptr, base4, num_entries: from `_open`.
    first: a multiple of 16 * WARPS; int32. begin, end: tiles, side by side, whose columns are taken; int32.
    """
    WARPS: tl.constexpr = acc.shape[0]
    prmt: tl.constexpr = FORM == _PERMUTED
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300  (a constexpr must be left of a dtype)
    # Groups are [(8 rows of a band, block of 64 columns, warp), row, group of a block].
    groups: tl.constexpr = _BAND // 8 * _BLOCKS
    index = tl.arange(0, groups * WARPS)[:, None, None]
    row = index % WARPS * _BAND + index // (_BLOCKS * WARPS) * 8 + tl.arange(0, 8)[None, :, None]
    row += first
    group = index // WARPS % _BLOCKS * 4 + tl.arange(0, 4)[None, None, :]  # of a row of a tile
    in_tile = row % _TILE_ROWS * _ROW_GROUPS + group
    # Rows beyond the last are the last once more; they are not stored.
    at = tl.minimum(row, rows - 1).to(tl.int64) * (cols // _GROUP) + group
    low = low.to(tl.pointer_type(tl.uint32)) + (at * 4)[:, :, :, None]
    low += tl.arange(0, 4)[None, None, None, :]
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    steps = cols // _TILE_COLS
    lane = tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    # What is added is 0, but gives the tiles of a turn all axes, which `_start` sorts.
    tile = first + tl.arange(0, WARPS)[:, None, None] * _BAND + (lane >> 5)
    tile = tl.minimum(tile, rows - 1) // _TILE_ROWS * steps
    x = x_ptr.to(tl.pointer_type(tl.bfloat16)) + m[None, None, :] * cols
    at_once: tl.constexpr = _TILE_COLS if m.shape[0] <= 16 else _BLOCK
    x += tl.arange(0, at_once)[None, :, None]
    if begin < end:
        low_words, codes = (
            _words(low, begin * 32, is_gpu, True),
            _words(high, begin * 16, is_gpu, True),
        )
        entry = _start(starts_ptr, tile + begin, is_gpu)
        stop = _start(starts_ptr, tile + begin + 1, is_gpu)
        beyond = _start(starts_ptr, tile + tl.minimum(begin + 2, steps), is_gpu)
        entry, stop = _bounded(entry, stop, num_entries)
        fetched = _fetch(entry, stop, entries_ptr, FORM)
        for step in tl.range(begin, end, num_stages=1):
            low0, low1, low2, low3 = _split_four(low_words)
            codes0, codes1 = tl.split(codes)
            a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
            e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
            # What the last turn loads ahead is not used. As in fast_matmul_ahead.py, where to load from depends on what
            # the turn before has loaded, by a bit that is 0.
            bit = (fetched.to(tl.uint32) >> 31) & (beyond >> 31)
            ahead = tl.minimum(step + 1 + bit.to(tl.int32), end - 1)
            ahead = _of_groups(ahead, groups)[:, :, :, None]
            low_words, codes = (
                _words(low, ahead * 32, is_gpu, True),
                _words(high, ahead * 16, is_gpu, True),
            )
            a, b, c, d, e, f, g, h = _patch_by_lane(
                a, b, c, d, e, f, g, h, in_tile, _of_groups(entry, groups), _of_groups(stop, groups),
                _of_groups(fetched, groups), entries_ptr, _BAND, FORM,
            )  # fmt: skip
            entry, stop = _bounded(stop.to(tl.uint32), beyond, num_entries)
            fetched = _fetch(entry, stop, entries_ptr, FORM)
            beyond = _start(starts_ptr, tile + tl.minimum(step + 3, steps), is_gpu)
            acc = _add_turn(acc, a, b, c, d, e, f, g, h, x + step * _TILE_COLS, OPERAND)
    return acc


@triton.jit(do_not_specialize=["salt", "low_bytes", "rows", "num_x"])
def _bands_kernel(
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
    WARPS: tl.constexpr,  # a power of two
    HAS_PARTS: tl.constexpr,
    FORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,  # bfloat16; float32 in the interpreter, which cannot multiply BF16
):
    """Grid (ceil(rows / (16 * WARPS)), parts)."""
    is_sound, low, high, starts_ptr, entries_ptr, base4, num_entries = _open(
        desc_ptr, salt, rows, cols
    )
    first = tl.program_id(0) * (_BAND * WARPS)
    part = tl.program_id(1)
    m = tl.minimum(tl.arange(0, ROWS), num_x - 1)
    steps = cols // _TILE_COLS
    per_part = tl.cdiv(steps, tl.num_programs(1))
    begin = part * per_part
    end = tl.where(is_sound, tl.minimum(begin + per_part, steps), begin)
    # Without a sound descriptor nothing is added to NaN.
    acc = tl.zeros([WARPS, _BAND, ROWS], tl.float32) + tl.where(is_sound, 0.0, float("nan"))
    acc = _sum_bands(
        acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes.to(tl.uint32),
        first, rows, x_ptr, m, cols, begin, end, FORM, OPERAND,
    )  # fmt: skip
    n = tl.arange(0, WARPS)[:, None, None] * _BAND + tl.arange(0, _BAND)[None, :, None]
    m = tl.arange(0, ROWS)[None, None, :]
    _store_sums(acc, out_ptr, bias_ptr, first + n, m, part, rows, num_x, ROWS, HAS_PARTS, HAS_BIAS)
