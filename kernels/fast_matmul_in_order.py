"""The product with the fast layout, loaded ahead, in the order of the columns: each step takes the next 16.

A program has BN rows of weights. In a turn each of its warps decodes the next tile of them, 128 columns, and all tiles
go through shared memory to the tensor cores, where every warp adds up all of them. So sums stay in one order, while
matrices of few rows keep many warps busy. Loads are made ahead as in fast_matmul_ahead.py; nothing is exchanged between
threads but through shared memory, 16 bytes at a time.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PERMUTED, _bounded, _split_four
from vllm_dfloat.kernels.fast_lane_escapes import _fetch, _patch_by_lane
from vllm_dfloat.kernels.fast_matmul_dot import _as, _words
from vllm_dfloat.kernels.fast_planes import _eight_weights

_GROUP = tl.constexpr(fast_layout.GROUP)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
_TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
_PERMUTED = tl.constexpr(PERMUTED)
_ROW_GROUPS = tl.constexpr(fast_layout.TILE_COLS // fast_layout.GROUP)
_BLOCKS = tl.constexpr(fast_layout.TILE_COLS // 64)


@triton.jit
def _start(starts, tile, IS_GPU: tl.constexpr):
    """Load the first entry of each warp's tile: uint32 [WARPS, 8, 4], one per thread, as `tile`.

    The claims of contiguity only sort the axes, as in `_words`.
    """
    begin = starts + tile
    if IS_GPU:
        begin = tl.max_contiguous(begin, [1, 2, 4])
    return tl.load(begin)


@triton.jit
def _starts(starts, tile, IS_GPU: tl.constexpr):
    """Load the first entry of each warp's tile, and its last + 1."""
    return _start(starts, tile, IS_GPU), _start(starts, tile + 1, IS_GPU)


@triton.jit
def _of_groups(value, N: tl.constexpr):
    """Repeat what each thread has, [WARPS, 8, 4], for its N groups: [N * WARPS, 8, 4]."""
    WARPS: tl.constexpr = value.shape[0]
    value = tl.broadcast_to(tl.reshape(value, [1, WARPS, 8, 4]), [N, WARPS, 8, 4])
    return tl.reshape(value, [N * WARPS, 8, 4])


@triton.jit
def _along(words):
    """Return words [A, B, C], each repeated 16 times along a new last axis."""
    A: tl.constexpr = words.shape[0]
    B: tl.constexpr = words.shape[1]
    C: tl.constexpr = words.shape[2]
    return tl.broadcast_to(tl.reshape(words, [A, B, C, 1]), [A, B, C, 16])


@triton.jit
def _weights_of_groups(a, b, c, d, e, f, g, h):
    """Return the words of each group, [A, B, C], as BF16 [A, B, C, 16].

    Each thread keeps its 16 columns: what is chosen by `which` is known to the compiler. Not by tl.join, which would
    make Triton take 4 columns of a thread together, half of them for the next step.
    """
    which = tl.arange(0, 16)[None, None, None, :]
    words = _along(a)
    words = tl.where(which // 2 == 1, _along(b), words)
    words = tl.where(which // 2 == 2, _along(c), words)
    words = tl.where(which // 2 == 3, _along(d), words)
    words = tl.where(which // 2 == 4, _along(e), words)
    words = tl.where(which // 2 == 5, _along(f), words)
    words = tl.where(which // 2 == 6, _along(g), words)
    words = tl.where(which // 2 == 7, _along(h), words)
    return (words >> (which % 2 * 16)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _in_order(a, b, c, d, e, f, g, h, BN: tl.constexpr, WARPS: tl.constexpr):
    """Return the words of each group, as `_sum_in_order` has them, as BF16 [BN, 128 * WARPS], transposed if BN is 8."""
    weights = _weights_of_groups(a, b, c, d, e, f, g, h)
    weights = tl.reshape(weights, [BN // 8, _BLOCKS, WARPS, 8, 4, 16])
    # Not transposed afterwards: Triton would do that through shared memory, two bytes at a time.
    if BN == 8:
        weights = tl.reshape(tl.permute(weights, (2, 1, 4, 5, 0, 3)), [WARPS * _TILE_COLS, BN])
    else:
        weights = tl.reshape(tl.permute(weights, (0, 3, 2, 1, 4, 5)), [BN, WARPS * _TILE_COLS])
    return weights


@triton.jit
def _sum_in_order(
    acc, low, high, starts_ptr, entries_ptr, base4, num_entries, low_bytes, first, rows, x_ptr, m, cols, end,
    BN: tl.constexpr, WARPS: tl.constexpr, FORM: tl.constexpr, OPERAND: tl.constexpr, ONCE: tl.constexpr = True,
):  # fmt: skip
    """Add to acc the products of BN rows of the matrix, from row `first`, with rows `m` of x.

    acc: FP32 [BN, ROWS], or [ROWS, BN] if BN is 8.
    low, high, starts_ptr, entries_ptr, base4, num_entries: from `_open`.
    first: a multiple of BN; int32. end: tiles side by side, or 0, a multiple of WARPS; int32.
    ONCE: no other program reads these rows of the matrix.
    """
    prmt: tl.constexpr = FORM == _PERMUTED
    is_gpu: tl.constexpr = OPERAND != tl.float32  # noqa: SIM300  (a constexpr must be left of a dtype)
    # Groups are [(8 rows, block of 64 columns, warp), row, group of a block], so that a warp has those of its tile.
    groups: tl.constexpr = BN // 8 * _BLOCKS
    index = tl.arange(0, groups * WARPS)[:, None, None]
    row = index // (_BLOCKS * WARPS) * 8 + tl.arange(0, 8)[None, :, None]
    group = index // WARPS % _BLOCKS * 4 + tl.arange(0, 4)[None, None, :]  # of a row of a tile
    in_tile = (first % _TILE_ROWS + row) * _ROW_GROUPS + group
    lane = tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    # What is added is 0, but gives the tiles of a turn all axes, which `_starts` sorts.
    tile = tl.arange(0, WARPS)[:, None, None] + (lane >> 5)
    # Rows beyond the last are the last once more; they are not stored.
    at = tl.minimum(first + row, rows - 1).to(tl.int64) * (cols // _GROUP)
    at += index % WARPS * _ROW_GROUPS + group
    low = low.to(tl.pointer_type(tl.uint32)) + (at * 4)[:, :, :, None]
    low += tl.arange(0, 4)[None, None, None, :]
    high += (at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    steps = cols // _TILE_COLS
    starts = starts_ptr + first // _TILE_ROWS * steps
    x = x_ptr.to(tl.pointer_type(tl.bfloat16)) + m[:, None] * cols
    x += tl.arange(0, WARPS * _TILE_COLS)[None, :]
    if end > 0:
        low_words, codes = _words(low, 0, is_gpu, ONCE), _words(high, 0, is_gpu, ONCE)
        entry, stop = _starts(starts, tile, is_gpu)
        next_entry, next_stop = _starts(starts, tl.minimum(tile + WARPS, steps - 1), is_gpu)
        entry, stop = _bounded(entry, stop, num_entries)
        fetched = _fetch(entry, stop, entries_ptr, FORM)
        for step in tl.range(0, end, WARPS, num_stages=1):
            low0, low1, low2, low3 = _split_four(low_words)
            codes0, codes1 = tl.split(codes)
            a, b, c, d = _eight_weights(low0, low1, codes0, base4, low_bytes, prmt)
            e, f, g, h = _eight_weights(low2, low3, codes1, base4, low_bytes, prmt)
            # What the last turn loads ahead is not used. As in fast_matmul_ahead.py, where to load from depends on what
            # the turn before has loaded, by a bit that is 0.
            bit = (fetched.to(tl.uint32) >> 31) & (next_stop >> 31)
            ahead = tl.minimum(step + WARPS + bit.to(tl.int32), end - WARPS)
            ahead = _of_groups(ahead, groups)[:, :, :, None]
            low_words, codes = (
                _words(low, ahead * 32, is_gpu, ONCE),
                _words(high, ahead * 16, is_gpu, ONCE),
            )
            a, b, c, d, e, f, g, h = _patch_by_lane(
                a, b, c, d, e, f, g, h, in_tile, _of_groups(entry, groups), _of_groups(stop, groups),
                _of_groups(fetched, groups), entries_ptr, BN, FORM,
            )  # fmt: skip
            entry, stop = _bounded(next_entry, next_stop, num_entries)
            fetched = _fetch(entry, stop, entries_ptr, FORM)
            later = tl.minimum(step + 2 * WARPS + tile, steps - 1)
            next_entry, next_stop = _starts(starts, later, is_gpu)
            xs = _as(tl.load(x + step * _TILE_COLS), OPERAND)
            weights = _as(_in_order(a, b, c, d, e, f, g, h, BN, WARPS), OPERAND)
            acc = tl.dot(xs, weights, acc) if BN == 8 else tl.dot(weights, tl.trans(xs), acc)
    return acc
