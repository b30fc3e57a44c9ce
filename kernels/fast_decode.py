"""Decode a whole matrix in the fast layout to row-major BF16, in one pass.

A program decodes a block of rows and columns within a row of tiles. A thread loads 16 low bytes and 2 words of nibbles
and stores 16 weights; nothing depends on the data but escapes. These are rare: a program whose tiles have some waits
until all its weights are stored, and then stores the escapes over them.

For any bytes of a payload, every loop has a constant bound, no read leaves the entries, and no write the block.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout

GROUP = tl.constexpr(fast_layout.GROUP)
HALF = tl.constexpr(fast_layout.HALF)
TILE_ROWS = tl.constexpr(fast_layout.TILE_ROWS)
TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)
RAW_ENTRIES = tl.constexpr(fast_layout.RAW_ENTRIES)
SIGN_CODES = tl.constexpr(0x01010101 * fast_layout.SIGN_CODE_MASK)
LOW_BYTES = 0x00FF00FF
MAX_ESCAPES = tl.constexpr(fast_layout.MAX_ESCAPES)
AT_A_TIME = tl.constexpr(32)  # escapes of a tile


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
        first = (low & low_bytes) | ((high << 8) & ~low_bytes)
        second = ((low >> 8) & low_bytes) | (high & ~low_bytes)
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
def _store_escapes(
    starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, begin, end, num_entries,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store the escapes of TILES tiles that lie in ROWS rows from `first_row` on, 32 of each tile at a time.

    begin, end: first entry of the first tile and after the last one.
    """
    top = first_row // TILE_ROWS * TILE_ROWS
    bottom = tl.minimum(first_row + ROWS, rows)
    index = tl.arange(0, TILES * AT_A_TIME)
    tile = index // AT_A_TIME
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    is_there = first_tile_col + tile < tile_cols
    first = tl.load(starts_ptr + first_tile + tile, mask=is_there, other=0).to(tl.int64)
    last = tl.load(starts_ptr + first_tile + tile + 1, mask=is_there, other=0).to(tl.int64)
    first = tl.minimum(first, num_entries)
    count = tl.minimum(last, num_entries) - first
    count = tl.where(count == RAW_ENTRIES, 0, count)
    # No tile has more entries than all together. A tile with more than MAX_ESCAPES is raw.
    most = tl.minimum(end - begin, MAX_ESCAPES).to(tl.int32)
    for step in range(0, most, AT_A_TIME):
        number = step + index % AT_A_TIME
        is_one = number < count
        entry = tl.load(entries_ptr + first + number, mask=is_one, other=0)
        position = (entry >> 16).to(tl.int32)
        row = top + position // TILE_COLS
        col = (first_tile_col + tile) * TILE_COLS + position % TILE_COLS
        is_here = is_one & (row >= first_row) & (row < bottom) & (col < cols)
        tl.store(out_ptr + (row.to(tl.int64) * cols + col), entry.to(tl.uint16), mask=is_here)


@triton.jit
def _store_raw(entries, out_ptr, first_row, tile_col, rows, cols, ROWS: tl.constexpr):
    """Store ROWS rows of a raw tile from `first_row` on; entries: pointer to the first entry of the tile."""
    PAIRS: tl.constexpr = TILE_COLS // 2
    AT_ONCE: tl.constexpr = 4  # rows
    pair = tl.arange(0, AT_ONCE * PAIRS)
    for step in range(0, ROWS, AT_ONCE):
        row = first_row + step + pair // PAIRS
        col = tile_col * TILE_COLS + pair % PAIRS * 2
        both = tl.load(entries + (row % TILE_ROWS * PAIRS + pair % PAIRS))
        place = out_ptr + (row.to(tl.int64) * cols + col)
        tl.store(place, both.to(tl.uint16), mask=(row < rows) & (col < cols))
        tl.store(place + 1, (both >> 16).to(tl.uint16), mask=(row < rows) & (col + 1 < cols))


@triton.jit
def _patch(
    starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, begin, end, num_entries,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store escapes and raw tiles over what the planes gave."""
    tl.debug_barrier()  # they are stored by other threads than the weights that they replace
    _store_escapes(
        starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, begin, end, num_entries,
        ROWS, TILES,
    )  # fmt: skip
    if end - begin >= RAW_ENTRIES:
        tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
        for tile in range(0, tl.minimum(TILES, tile_cols - first_tile_col)):
            first = tl.load(starts_ptr + first_tile + tile).to(tl.int64)
            last = tl.load(starts_ptr + first_tile + tile + 1).to(tl.int64)
            if (last - first == RAW_ENTRIES) & (last <= num_entries):
                _store_raw(
                    entries_ptr + first, out_ptr, first_row, first_tile_col + tile, rows, cols, ROWS
                )


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["rows", "cols", "base4", "num_entries", "low_bytes"])
def _fast_decode_kernel(
    low_ptr,  # uint8[rows, pitch]             sections of the payload, see codec/fast_layout.py
    high_ptr,  # uint32[rows, pitch / 16, 2]
    starts_ptr,  # uint32[num_tiles + 1]
    entries_ptr,  # uint32[num_entries]
    out_ptr,  # uint16[rows, cols]             BF16 bits
    rows,  # int32
    cols,  # int32
    base4,  # int32                          half of the base, in each of 4 bytes
    num_entries,  # int32
    low_bytes,  # int32                      0x00FF00FF, see `_four_weights`
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLS_FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    PRMT: tl.constexpr,
):
    """Decode ROWS rows of TILES tiles of 128 columns.

    Equal bit for bit to `vllm_dfloat.codec.fast_reference.decode`. Grid (blocks of a row, rows of
    blocks). Reads about 12 bits and writes 16 per weight.

    ROWS: divides TILE_ROWS. STEP: rows at a time, divides ROWS.
    AT_ONCE: weights of a thread at a time, 8 or 16; with 8 a warp stores whole lines, 16 take fewer instructions.
    COLS_FACTOR: 16 or 8 if it divides `cols`, else 1.
    WHOLE: whether ROWS divides `rows` and TILES * 128 divides `cols`; then COLS_FACTOR is 16.
    """
    tile_cols = (cols + TILE_COLS - 1) // TILE_COLS
    first_row = tl.program_id(1) * ROWS
    first_tile_col = tl.program_id(0) * TILES
    first_tile = (first_row // TILE_ROWS).to(tl.int64) * tile_cols + first_tile_col
    num_tiles = tl.minimum(TILES, tile_cols - first_tile_col)
    begin = tl.load(starts_ptr + first_tile).to(tl.int64)
    end = tl.load(starts_ptr + first_tile + num_tiles).to(tl.int64)
    _decode_planes(
        low_ptr, high_ptr, out_ptr, rows, cols, base4.to(tl.uint32), low_bytes.to(tl.uint32),
        first_row, first_tile_col * TILE_COLS, ROWS, STEP, TILES * TILE_COLS, AT_ONCE, COLS_FACTOR, WHOLE, PRMT,
    )  # fmt: skip
    if begin != end:
        _patch(
            starts_ptr, entries_ptr, out_ptr, first_tile, first_tile_col, first_row, rows, cols, begin, end,
            num_entries, ROWS, TILES,
        )  # fmt: skip


def decode_sections(
    low: torch.Tensor,
    high: torch.Tensor,
    starts: torch.Tensor,
    entries: torch.Tensor,
    base: int,
    out: torch.Tensor,
    *,
    prmt: bool,
    rows_per_program: int = 64,
    rows_at_once: int = 8,
    tiles_per_program: int = 4,
    at_once: int = 8,
    num_warps: int = 8,
) -> None:
    """Decode the matrix that lies in these sections into `out`; allocates nothing and does not wait for the device.

    Args:
        low, high, starts, entries: sections of a payload, each on a multiple of 16 bytes.
        base: of the layout.
        out: BF16 [rows, cols], contiguous, aligned to 16 bytes.
        prmt: join bytes with an instruction of NVIDIA GPUs; the same bits.
        rows_per_program: divides 64. The rest are launch parameters too.
    """
    rows, cols = out.shape
    if out.numel():
        blocks = triton.cdiv(triton.cdiv(cols, fast_layout.TILE_COLS), tiles_per_program)
        whole = (
            rows % rows_per_program == 0 and cols % (tiles_per_program * fast_layout.TILE_COLS) == 0
        )
        factor = next(f for f in (fast_layout.GROUP, fast_layout.HALF, 1) if cols % f == 0)
        _fast_decode_kernel[(blocks, triton.cdiv(rows, rows_per_program))](
            low, high, starts, entries, out.view(torch.uint16), rows, cols, base // 2 * 0x01010101, entries.numel(),
            LOW_BYTES, rows_per_program, rows_at_once, tiles_per_program, at_once, factor, whole, prmt,
            num_warps=num_warps,
        )  # fmt: skip
