"""Length-limited canonical Huffman codes over the 256 exponents of BF16.

The code lengths come from the package-merge algorithm (Larmore and Hirschberg 1990), which is optimal under a limit.
Codes are canonical: numbered by (length, symbol), so the lengths alone are the codebook.
"""

import numpy as np

from vllm_dfloat.codec.arrays import I64Array, U8Array, U16Array
from vllm_dfloat.codec.layout import LENGTH_MASK, MAX_CODE_BITS, MIN_CODE_BITS, SYMBOL_SHIFT

NUM_SYMBOLS = 256
WORTH_A_LARGER_LUT = 0.1  # bits per weight


def choose_code(counts: I64Array) -> tuple[int, U8Array]:
    """Return the longest code to allow, and the code lengths under that limit.

    The smallest limit whose codes take less than WORTH_A_LARGER_LUT more than those of the largest limit. With the 30
    symbols of trained weights 8 bits cost about 0.05 more; with all 256 symbols 8 bits would save nothing.

    Args:
        counts: how often each of the 256 symbols occurs, int64 [256].
    """
    candidates = {
        limit: code_lengths(counts, limit) for limit in range(MIN_CODE_BITS, MAX_CODE_BITS + 1)
    }
    bits = {limit: int(counts @ lengths) for limit, lengths in candidates.items()}
    allowed = bits[MAX_CODE_BITS] + WORTH_A_LARGER_LUT * int(counts.sum())
    limit = next(limit for limit in candidates if bits[limit] <= allowed)
    return limit, candidates[limit]


def code_lengths(counts: I64Array, limit: int) -> U8Array:
    """Return the optimal code length of each symbol, none longer than `limit` bits.

    Args:
        counts: how often each of the 256 symbols occurs.
        limit: longest code allowed, in bits; `1 << limit` must be at least the number of symbols that occur.

    Returns:
        uint8 [256]; 0 for a symbol that does not occur. A symbol that is alone gets one bit.

    Raises:
        ValueError: the limit is too small for the number of symbols.
    """
    lengths = np.zeros(NUM_SYMBOLS, np.uint8)
    symbols = np.flatnonzero(counts)
    if symbols.size > 1 << limit:
        raise ValueError(f"{symbols.size} symbols need codes longer than {limit} bits")
    if symbols.size <= 1:
        lengths[symbols] = 1
        return lengths
    coins = sorted((int(counts[s]), (int(s),)) for s in symbols)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(limit):
        merged = sorted(coins + packages)
        packages = [
            (merged[i][0] + merged[i + 1][0], merged[i][1] + merged[i + 1][1])
            for i in range(0, len(merged) - 1, 2)
        ]
    # The cheapest n - 1 packages of the last row: a symbol's length is how often it occurs in them.
    for _, members in packages[: symbols.size - 1]:
        for symbol in members:
            lengths[symbol] += 1
    return lengths


def canonical_codes(lengths: U8Array) -> U16Array:
    """Return the code of each symbol, right-aligned in a uint16; symbols of length 0 get 0."""
    codes = np.zeros(NUM_SYMBOLS, np.uint16)
    code = 0
    previous = 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda s: (lengths[s], s)):
        length = int(lengths[symbol])
        code <<= length - previous
        codes[symbol] = code
        code, previous = code + 1, length
    return codes


def build_lut(lengths: U8Array, code_bits: int) -> U16Array:
    """Return the decode table: the next `code_bits` bits of the stream -> symbol << 7 | code length.

    Entries without a code (half of them if there is only one symbol) hold 0. A length of 0 makes a decoder stop before
    the end of its lane, which it reports.
    """
    lut = np.zeros(1 << code_bits, np.uint16)
    codes = canonical_codes(lengths)
    for symbol in np.flatnonzero(lengths):
        length = int(lengths[symbol])
        first = int(codes[symbol]) << (code_bits - length)
        entry = int(symbol) << SYMBOL_SHIFT | length & LENGTH_MASK
        lut[first : first + (1 << (code_bits - length))] = entry
    return lut
