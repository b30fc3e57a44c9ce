"""Shared by the kernels of the fast layout: find its sections, and decode its planes to row-major BF16.

A thread loads 8 or 16 low bytes and one or two words of nibbles, and stores as many weights; nothing depends on the
data. Escapes come afterwards (fast_patches.py). The bits are joined in one of two forms: in plain Triton, which the
interpreter can run, and with PRMT, the byte permutation of NVIDIA GPUs. A GPU test compares them.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.tiles import _read, _section

GROUP = tl.constexpr(fast_layout.GROUP)
HALF = tl.constexpr(fast_layout.HALF)
TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
SIGN_CODES = tl.constexpr(0x01010101 * fast_layout.SIGN_CODE_MASK)
NAN = tl.constexpr(0x7FC0)
LOW_BYTES = 0x00FF00FF


def cols_factor(cols: int) -> int:
    """Return COLS_FACTOR for rows of `cols` weights: the largest of 16, 8 and 1 that divides it."""
    return next(f for f in (fast_layout.GROUP, fast_layout.HALF, 1) if cols % f == 0)


@triton.jit
def _open(desc_ptr, salt, rows, cols):
    """Read a descriptor; return whether it is sound, pointers to the four sections, base4 and the number of entries.

    base4: half of the base, in each of 4 bytes. The other results may be used only if the descriptor is sound.
    """
    is_sound, payload, _kind, sizes = _read(desc_ptr, salt)
    num_entries = sizes & 0xFFFFFFFF
    base4 = ((sizes >> 33) * 0x01010101).to(tl.uint32)
    groups = rows.to(tl.int64) * ((cols + GROUP - 1) // GROUP)
    starts_offset = groups * GROUP + (groups + 1) // 2 * GROUP
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    num_tiles = ((rows + TILE_ROWS - 1) // TILE_ROWS).to(tl.int64) * tile_cols
    entries_offset = starts_offset + (4 * (num_tiles + 1) + 15) // 16 * 16
    low = _section(payload, 0, tl.uint8)
    high = _section(payload, groups * GROUP, tl.uint32)
    starts = _section(payload, starts_offset, tl.uint32)
    entries = _section(payload, entries_offset, tl.uint32)
    return is_sound, low, high, starts, entries, base4, num_entries


@triton.jit
def _turned(word):
    """Return a word rotated right by 4 bits."""
    return (word >> 4) | (word << 28)


@triton.jit
def _four_weights(low, high, low_bytes, PRMT: tl.constexpr):
    """Return the BF16 bits of 4 weights as two words.

    low, high: the low bytes and the high bytes of weights 0, 2, 1, 3.
    low_bytes: 0x00FF00FF; not a constant, for with one the compiler makes a bit-select of two instructions.
    PRMT: join them with the byte permutation of NVIDIA GPUs; Triton's interpreter cannot run it.
    """
    if PRMT:
        first = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6240;", "=r,r,r", [low, high], tl.uint32, True, 1
        )
        second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7351;", "=r,r,r", [low, high], tl.uint32, True, 1
        )
    else:
        high_bytes = low_bytes ^ 0xFFFFFFFF  # the interpreter of Triton 3.6 cannot do ~
        first = (low & low_bytes) | ((high << 8) & high_bytes)
        second = ((low >> 8) & low_bytes) | (high & high_bytes)
    return first, second


@triton.jit
def _eight_weights(low0, low1, nibbles, base4, low_bytes, PRMT: tl.constexpr):
    """Return the BF16 bits of 8 weights as four words.

    low0, low1: their low bytes, each 4 in the order 0, 2, 1, 3.
    nibbles: a word of the high plane.
    base4: half of the base, in each of 4 bytes.
    """
    # No sum leaves its byte: a distance is at most 7 and half of the base at most 120.
    a, b = _four_weights(low0, (nibbles & SIGN_CODES) + base4, low_bytes, PRMT)
    c, d = _four_weights(low1, (_turned(nibbles) & SIGN_CODES) + base4, low_bytes, PRMT)
    return a, b, c, d


@triton.jit
def _interleave(a, b, c, d):
    """Return [n, 4] with a, b, c, d along the last axis; each thread keeps its values."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0], 4])


@triton.jit
def _four_words(pointers, mask, N: tl.constexpr):
    """Load 16 bytes from each of N pointers; return 4 words [N]. mask: [N, 1] or None."""
    four = tl.load(pointers[:, None] + tl.arange(0, 4)[None, :], mask=mask)
    even, odd = tl.split(tl.reshape(four, [N, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _two_words(pointers, mask):
    """Load 8 bytes from each pointer; return 2 words [N]."""
    return tl.split(tl.load(pointers[:, None] + tl.arange(0, 2)[None, :], mask=mask))


@triton.jit
def _one_word(ptr, place, mask):
    """Load the word at each `place` behind the pointer to words `ptr`; return words [N].

    As halves, in order that a thread loads the word of its 8 low bytes: of words it would load four neighbours.
    """
    halves = ptr.to(tl.pointer_type(tl.uint16)) + (place * 2)[:, None] + tl.arange(0, 2)[None, :]
    low, high = tl.split(tl.load(halves, mask=mask))
    return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def _store_eight(out_ptr, at, words, is_here, col, cols, COLS_FACTOR: tl.constexpr):
    """Store 8 weights of each thread, without those past the end of the row.

    out_ptr: uint16, or pairs of weights as uint32 if COLS_FACTOR is at least HALF.
    at: index of the first weight behind `out_ptr`; a multiple of HALF if COLS_FACTOR is.
    is_here: [N, 1], whether the row is there, and any of the thread's columns; None if all are.
    col: column of the first weight.
    """
    if COLS_FACTOR >= HALF:
        place = out_ptr + (at // HALF * 4)[:, None] + tl.arange(0, 4)[None, :]
        a, b, c, d = words
        if COLS_FACTOR < GROUP:
            is_here = is_here & (col < cols)[:, None]
        tl.store(place, _interleave(a, b, c, d), mask=is_here)
    else:
        for j in tl.static_range(HALF):
            value = (words[j // 2] >> (16 * (j % 2))).to(tl.uint16)
            tl.store(
                (out_ptr + at + j)[:, None],
                value[:, None],
                mask=is_here & (col + j < cols)[:, None],
            )


@triton.jit
def _decode_planes(
    low_ptr, high_ptr, out_ptr, rows, cols, base4, low_bytes, first_row, first_col,
    ROWS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, COLS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr, PRMT: tl.constexpr,
):  # fmt: skip
    """Decode the planes of ROWS rows and WIDTH columns, STEP rows at a time."""
    PARTS: tl.constexpr = WIDTH // AT_ONCE  # of a row; a thread decodes one
    N: tl.constexpr = STEP * PARTS
    parts = (cols + GROUP - 1) // GROUP * (GROUP // AT_ONCE)
    index = tl.arange(0, N)
    row, part = index // PARTS, index % PARTS
    first_part = first_col // AT_ONCE
    col = first_col + part * AT_ONCE
    # Rows that are left for a thread: none past the last column.
    left = tl.where(part < parts - first_part, rows - first_row, 0)
    place = row * parts + part
    if COLS_FACTOR == GROUP:  # then a row has `parts` parts in the output too
        at = place * AT_ONCE
    elif COLS_FACTOR == HALF:
        at = (row * (cols // HALF) + part * (AT_ONCE // HALF)) * HALF
    else:
        at = row * cols + part * AT_ONCE
    end = ROWS if WHOLE else tl.minimum(ROWS, rows - first_row)
    for first in range(0, end, STEP):
        first_place = (first_row + first).to(tl.int64) * parts + first_part
        low = low_ptr.to(tl.pointer_type(tl.uint32)) + first_place * (AT_ONCE // 4)
        high = high_ptr + first_place * (AT_ONCE // HALF)
        if COLS_FACTOR >= HALF:
            eights = (first_row + first).to(tl.int64) * (cols // HALF) + first_col // HALF
            out = out_ptr.to(tl.pointer_type(tl.uint32)) + eights * 4
        else:
            out = out_ptr + ((first_row + first).to(tl.int64) * cols + first_col)
        is_here = None if WHOLE else (row < left - first)[:, None]
        if AT_ONCE == GROUP:
            l0, l1, l2, l3 = _four_words(low + place * 4, is_here, N)
            h0, h1 = _two_words(high + place * 2, is_here)
            words = _eight_weights(l0, l1, h0, base4, low_bytes, PRMT)
            _store_eight(out, at, words, is_here, col, cols, COLS_FACTOR)
            words = _eight_weights(l2, l3, h1, base4, low_bytes, PRMT)
            _store_eight(out, at + HALF, words, is_here, col + HALF, cols, COLS_FACTOR)
        else:
            l0, l1 = _two_words(low + place * 2, is_here)
            words = _eight_weights(l0, l1, _one_word(high, place, is_here), base4, low_bytes, PRMT)
            _store_eight(out, at, words, is_here, col, cols, COLS_FACTOR)


@triton.jit
def _store_nan(out_ptr, rows, cols, first_row, first_col, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Make the weights of ROWS rows and WIDTH columns NaN."""
    col = first_col + tl.arange(0, WIDTH)
    for row in range(first_row, tl.minimum(first_row + ROWS, rows)):
        place = out_ptr + (tl.cast(row, tl.int64) * cols + col)
        tl.store(place, tl.full([WIDTH], NAN, tl.uint16), mask=col < cols)
