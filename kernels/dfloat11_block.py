"""Decode a block of an official DFloat11 stream: what the kernels of dfloat11_decode.py and dfloat11_resident.py share.

A block is 4096 stream bytes, 512 windows of 8 bytes; all windows are decoded in parallel. The number of codes in a
window varies, so a first pass counts the codes of every window, a scan gives each window its first weight, and a second
pass decodes again and writes. Codes have up to 32 bits: a lookup walks at most four tables of 256 entries.

The result equals vllm_dfloat.dfloat11.reference.decode bit for bit. For any bytes, the loops end after a fixed number
of steps and no access leaves the given tensors.
"""

import triton
import triton.language as tl

from vllm_dfloat.dfloat11 import format

WINDOWS = tl.constexpr(format.BLOCK_WINDOWS)
# A code has at least one bit, so at most this many codes start in a window.
_WINDOW_BITS = tl.constexpr(format.WINDOW_BITS)
_STRIDE = tl.constexpr(8)  # codes decoded between two checks whether any window is still busy
_LEVELS = tl.constexpr(format.MAX_DEPTH + 1)

_POINTER = tl.constexpr(format.POINTER)
_LENGTH_SHIFT = tl.constexpr(format.LENGTH_SHIFT)
_LENGTH_MASK = tl.constexpr(format.LENGTH_MASK)
_BAD_CODE = tl.constexpr(format.STATUS_BAD_CODE)
_COUNT = tl.constexpr(format.STATUS_COUNT)
_GAP = tl.constexpr(format.STATUS_GAP)


@triton.jit
def _load_word(stream_ptr, at, num_bytes):
    """Return the 4 bytes from byte `at` on, most significant first; bytes past the end are 0."""
    word = tl.zeros_like(at).to(tl.uint32)
    for i in tl.static_range(4):
        byte = tl.load(stream_ptr + at + i, mask=at + i < num_bytes, other=0)
        word = (word << 8) | byte.to(tl.uint32)
    return word


@triton.jit
def _load_gap(gaps_ptr, window, num_windows):
    """Return the 5-bit gap of each window, 0 past the last window."""
    bit = window * 5
    byte = bit >> 3
    inside = window < num_windows
    high = tl.load(gaps_ptr + byte, mask=inside, other=0).to(tl.int32)
    # The last gap ends with the last byte of the array, so its second byte is masked out.
    more = inside & (byte + 1 < num_windows * 5 // 8)
    low = tl.load(gaps_ptr + byte + 1, mask=more, other=0).to(tl.int32)
    return (((high << 8) | low) >> (11 - (bit & 7)).to(tl.int32)) & 31


@triton.jit
def _look_up(tables_ptr, num_rows, first, second, third, at, active):
    """Return `symbol | length << 8` for the code at bit `at` (0..63) of each window, 0 if there is no code."""
    high = tl.where(at < 32, first, second)
    low = tl.where(at < 32, second, third)
    shift = (at & 31).to(tl.uint32)
    peek = (high << shift) | ((low >> 1) >> (31 - shift))
    entry = tl.load(tables_ptr + (peek >> 24).to(tl.int32), mask=active, other=0)
    for level in tl.static_range(1, _LEVELS):
        deeper = (entry & _POINTER) != 0
        row = tl.minimum(entry & 0xFF, num_rows - 1)
        index = ((peek >> (24 - 8 * level)) & 0xFF).to(tl.int32)
        below = tl.load(tables_ptr + row * 256 + index, mask=active & deeper, other=0)
        entry = tl.where(deeper, below, entry)
    return tl.where((entry & _POINTER) != 0, 0, entry)


@triton.jit
def decode_block(
    stream_ptr,  # uint8[num_bytes]             codes, most significant bit first
    sign_mantissa_ptr,  # uint8[num_weights]    bit 7 sign, bits 6..0 mantissa
    tables_ptr,  # int32[num_rows * 256]        0, symbol | length << 8, or pointer | row
    positions_ptr,  # int64[num_blocks + 1]     first weight of each block
    gaps_ptr,  # uint8[320 * num_blocks]        5 bits per window
    out_ptr,  # int16                           BF16 bits; weight i goes to out_ptr + i
    status_ptr,  # int32[num_blocks] or None    a sum of STATUS_* bits
    num_bytes,
    num_weights,
    num_blocks,
    num_rows,
    block,  # int64                             0..num_blocks - 1
    low,
    high,
):
    """Decode a block and write its weights with index low..high - 1 (0 <= low, high <= num_weights).

    out = sign << 15 | symbol << 7 | mantissa. Both loops run at most 64 codes per window, so corrupt bytes cannot
    keep them running.
    """
    window = block * WINDOWS + tl.arange(0, WINDOWS)
    num_windows = num_blocks * WINDOWS
    byte = window * 8
    first = _load_word(stream_ptr, byte, num_bytes)
    second = _load_word(stream_ptr, byte + 4, num_bytes)
    third = _load_word(stream_ptr, byte + 8, num_bytes)
    gap = _load_gap(gaps_ptr, window, num_windows)
    # A code must start in this window and end within the stream.
    end = tl.minimum(tl.maximum((num_bytes - byte) * 8, 0), 1 << 20).to(tl.int32)
    stop = tl.minimum(end, _WINDOW_BITS)

    # Count. A window stops at its end, or at bits that are no code.
    at = gap
    count = tl.zeros_like(gap)
    bad = gap != gap
    step = 0
    busy = tl.max((at < stop).to(tl.int32), axis=0)
    while (step < _WINDOW_BITS) & (busy != 0):
        for _ in tl.static_range(_STRIDE):
            active = (at < stop) & ~bad
            entry = _look_up(tables_ptr, num_rows, first, second, third, at, active)
            length = (entry >> _LENGTH_SHIFT) & _LENGTH_MASK
            good = active & (length != 0) & (at + length <= end)
            bad = bad | (active & ~good)
            count += good.to(tl.int32)
            at += tl.where(good, length, 0)
        busy = tl.max(((at < stop) & ~bad).to(tl.int32), axis=0)
        step += _STRIDE

    # Scan, and compare with the file's positions and gaps. Any bits may follow the last weight.
    here = tl.load(positions_ptr + block)
    after = tl.load(positions_ptr + block + 1)
    begin = here + (tl.cumsum(count, axis=0) - count).to(tl.int64)
    following = begin + count
    total = here + tl.sum(count, axis=0).to(tl.int64)
    is_last = after >= num_weights
    miscount = (total < after) | ((total > after) & (is_last == 0))
    unfinished = following < num_weights
    next_gap = _load_gap(gaps_ptr, window + 1, num_windows)
    astray = unfinished & ~bad & (at != next_gap + _WINDOW_BITS) & (end > _WINDOW_BITS)
    status = tl.max((bad & unfinished).to(tl.int32), axis=0) * _BAD_CODE
    status += tl.max(astray.to(tl.int32), axis=0) * _GAP
    status += miscount.to(tl.int32) * _COUNT
    if status_ptr is not None:
        tl.store(status_ptr + block, status)

    # Write. The same walk; now the index of every code's weight is known.
    limit = tl.minimum(after, high)
    most = tl.max(count, axis=0)
    at = gap
    step = 0
    while (step < _WINDOW_BITS) & (step < most):
        active = step < count
        entry = _look_up(tables_ptr, num_rows, first, second, third, at, active)
        at += (entry >> _LENGTH_SHIFT) & _LENGTH_MASK
        index = begin + step
        inside = active & (index >= low) & (index < limit)
        rest = tl.load(sign_mantissa_ptr + index, mask=inside, other=0).to(tl.int32)
        bits = ((rest & 0x80) << 8) | ((entry & 0xFF) << 7) | (rest & 0x7F)
        tl.store(out_ptr + index, bits.to(tl.int16), mask=inside)
        step += 1
