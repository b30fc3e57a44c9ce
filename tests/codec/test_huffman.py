"""The length-limited code: optimal, prefix free, canonical."""

import heapq

import numpy as np
import pytest

from vllm_dfloat.codec.huffman import build_lut, canonical_codes, code_lengths


def unlimited_cost(counts: np.ndarray) -> int:
    """Return the total bits of plain Huffman coding: the sum of all merged weights."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def random_counts(seed: int, symbols: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = np.zeros(256, np.int64)
    counts[rng.permutation(256)[:symbols]] = (rng.pareto(0.7, symbols) * 10 + 1).astype(np.int64)
    return counts


@pytest.mark.parametrize("symbols", [2, 3, 10, 40, 256])
def test_code_costs_what_unlimited_huffman_costs_when_the_limit_does_not_bind(symbols: int) -> None:
    counts = random_counts(symbols, symbols)
    lengths = code_lengths(counts, 60)
    assert int(counts @ lengths.astype(np.int64)) == unlimited_cost(counts)


@pytest.mark.parametrize("limit", [8, 10, 12])
@pytest.mark.parametrize("symbols", [2, 30, 200, 256])
def test_limited_code_is_complete_and_within_its_limit(limit: int, symbols: int) -> None:
    lengths = code_lengths(random_counts(symbols + limit, symbols), limit)
    used = lengths[lengths > 0].astype(int)
    assert used.size == symbols
    assert used.max() <= limit
    assert sum(2.0**-n for n in used) == 1.0  # exact in binary floating point


def test_limited_code_is_optimal_on_a_case_solved_by_hand() -> None:
    # Fibonacci counts give codes of 1, 2, 3, 4, 4 bits, 25 in all; with at most 3 bits, 2, 2, 2, 3, 3 is optimal.
    counts = np.zeros(256, np.int64)
    counts[[1, 2, 3, 4, 5]] = [1, 1, 2, 3, 5]
    assert int(counts @ code_lengths(counts, 4)) == 25
    assert int(counts @ code_lengths(counts, 3)) == 26


def test_codes_are_prefix_free_and_fill_the_table() -> None:
    lengths = code_lengths(random_counts(3, 35), 10)
    codes = canonical_codes(lengths)
    words = [f"{codes[s]:0{lengths[s]}b}" for s in np.flatnonzero(lengths)]
    assert not any(a != b and b.startswith(a) for a in words for b in words)
    lut = build_lut(lengths, 10)
    for symbol in np.flatnonzero(lengths):
        first = int(codes[symbol]) << (10 - int(lengths[symbol]))
        assert lut[first] == int(symbol) << 7 | int(lengths[symbol])
    assert np.count_nonzero(lut) == 1 << 10


def test_lonely_symbol_gets_one_bit_and_half_the_table_leads_nowhere() -> None:
    counts = np.zeros(256, np.int64)
    counts[200] = 9
    lengths = code_lengths(counts, 10)
    assert lengths[200] == 1
    assert np.count_nonzero(build_lut(lengths, 10)) == 512


def test_a_limit_too_small_for_the_alphabet_is_refused() -> None:
    with pytest.raises(ValueError, match="256 symbols need codes longer than 7 bits"):
        code_lengths(np.ones(256, np.int64), 7)
