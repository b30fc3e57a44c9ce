"""The code book of the official DFloat11 encoder: which exponent gets which bits, and the tables that say so.

The rules are those of the official encoder, so units written here have its bytes. Codes are not canonical: they depend
on the order in which the tree is built, and a reader finds them in the tables (tables.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_dfloat.codec.arrays import I64Array, U8Array
from vllm_dfloat.dfloat11.format import MAX_CODE_BITS

EOF = -1  # the end marker: weight 1, ordered before every exponent

Codes = dict[int, tuple[int, int]]  # exponent or EOF -> (code, its length in bits)


def build_codes(counts: I64Array) -> Codes:
    """Return the code of every exponent that occurs and of EOF, none longer than 32 bits.

    If a code would be longer (which takes over 9 million weights), the k rarest exponents count as one weight each,
    with the smallest k that helps. The official encoder does the same, but there NumPy decides which of equally rare
    exponents come first; here the smaller ones do.

    Args:
        counts: how often each of the 256 exponents occurs.
    """
    codes = _tree_codes(counts)
    used = np.flatnonzero(counts)
    rarest = used[np.argsort(counts[used], kind="stable")]
    k = 2
    while max(length for _, length in codes.values()) > MAX_CODE_BITS:
        flattened = counts.copy()
        flattened[rarest[:k]] = 1
        codes = _tree_codes(flattened)
        k += 1
    return codes


def _tree_codes(counts: I64Array) -> Codes:
    """Return the codes of a Huffman tree: the smaller of two nodes is the 0 branch.

    Nodes are ordered by weight, and then by their first leaf: the one at the end of their 0 branches.
    """
    leaves = [(int(counts[symbol]), int(symbol)) for symbol in np.flatnonzero(counts)]
    heap: list[tuple[int, int, Any]] = [
        (weight, leaf, leaf) for weight, leaf in [(1, EOF), *leaves]
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        zero, one = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (zero[0] + one[0], zero[1], (zero[2], one[2])))
    codes: Codes = {}
    stack = [(heap[0][2], 0, 0)]
    while stack:
        node, code, length = stack.pop()
        if isinstance(node, tuple):
            stack += [(node[0], code << 1, length + 1), (node[1], code << 1 | 1, length + 1)]
        else:
            codes[node] = code, length
    return codes


def build_luts(codes: Codes) -> U8Array:
    """Return the tables of a code book and the row of code lengths, uint8 [tables + 1, 256].

    There may be more tables than pointers can name (MAX_ROWS), which the caller must check. Entries of EOF repeat the
    entry before them, across rows too, as in official files. The very first entry is 0 if it is EOF's: the official
    encoder cannot write such a table.
    """
    entries = _tables(codes)
    order = sorted(entries, key=lambda at: (at[0], at[1] << (MAX_CODE_BITS - 8 * at[0])))
    for row, (depth, prefix) in enumerate(order[1:], 1):
        # With too many tables these values are no pointers, and the caller raises an error.
        entries[depth - 1, prefix >> 8][prefix & 0xFF] = (256 - row) % 256
    luts = np.zeros((len(order) + 1, 256), np.uint8)
    value = 0
    for row, at in enumerate(order):
        for entry in range(256):
            value = entries[at].get(entry, value)
            luts[row, entry] = value
    for symbol, (_, length) in codes.items():
        if symbol != EOF:
            luts[-1, symbol] = length
    return luts


def _tables(codes: Mapping[int, tuple[int, int]]) -> dict[tuple[int, int], dict[int, int]]:
    """Return (depth, the 8 * depth bits that lead to a table) -> entry -> exponent, for every table with a code."""
    entries: dict[tuple[int, int], dict[int, int]] = {}
    for symbol, (code, length) in codes.items():
        if symbol == EOF:
            continue
        depth = (length - 1) // 8
        rest = length - 8 * depth
        first = (code & ((1 << rest) - 1)) << (8 - rest)
        table = entries.setdefault((depth, code >> rest), {})
        table.update(dict.fromkeys(range(first, first + (1 << (8 - rest))), symbol))
    entries.setdefault((0, 0), {})
    return entries
