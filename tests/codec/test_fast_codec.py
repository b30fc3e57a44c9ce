"""The fast layout on the CPU: the numba encoder and decoder against the oracle, for any bits."""

import numpy as np
import pytest
from fast_matrices import fast_matrices, large_fast_matrices, trained_like
from helpers import Bits, gaussian, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dfloat.codec import fast_reference
from vllm_dfloat.codec.fast_decode import decode, decode_rows
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.codec.fast_layout import MAX_ESCAPES, RAW_ENTRIES, FastTensor
from vllm_dfloat.device import fast_encode
from vllm_dfloat.errors import FormatError, UnsupportedError

MATRICES = fast_matrices() | large_fast_matrices()


def encoded(weight: Bits) -> FastTensor:
    fast = encode(weight)
    assert fast is not None
    return fast


def assert_follows_layout(fast: FastTensor) -> None:
    """Check the rules of docs/fast-layout.md, independently of the code that encodes and decodes."""
    lay = fast.layout
    assert lay.base % 2 == 0
    assert 0 <= lay.base <= 240
    assert fast.payload.shape == (lay.num_bytes,)
    assert not fast.low[:, -(-lay.cols // 4) * 4 :].any(), "padding"
    starts = fast.starts.astype(np.int64)
    assert (starts[0], starts[-1]) == (0, lay.num_entries)
    counts = np.diff(starts)
    assert ((counts >= 0) & ((counts <= MAX_ESCAPES) | (counts == RAW_ENTRIES))).all()
    for first, count in zip(starts, counts, strict=False):
        if count <= MAX_ESCAPES:
            positions = fast.entries[first : first + count] >> 16
            assert (np.diff(positions.astype(np.int64)) > 0).all(), "sorted"


@pytest.mark.parametrize("name", MATRICES)
def test_numba_encodes_to_the_bytes_of_the_kernels_and_decodes_them(name: str) -> None:
    weight = MATRICES[name]
    fast, found = encoded(weight), fast_encode.encode(to_torch(weight))
    assert_follows_layout(fast)
    assert found is not None
    assert found[0] == fast.layout
    assert np.array_equal(found[1].numpy(), fast.payload)
    assert np.array_equal(decode(fast), weight)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(1, 70),
    cols=st.sampled_from([96, 112, 127, 128, 129, 144, 250, 384]),
    escapes=st.integers(0, 60),
    base=st.integers(0, 120),
    seed=st.integers(0, 1 << 30),
)
def test_all_decoders_agree_for_any_base_and_any_escapes(
    rows: int, cols: int, escapes: int, base: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    exponents = 2 * base + rng.integers(0, 16, (rows, cols))
    weight = (
        rng.integers(0, 2, (rows, cols)) << 15 | exponents << 7 | rng.integers(0, 128, (rows, cols))
    )
    weight = weight.astype(np.uint16)
    places = rng.integers(0, weight.size, escapes)
    weight.reshape(-1)[places] = rng.integers(0, 1 << 16, escapes)
    fast, found = encode(weight), fast_encode.encode(to_torch(weight))
    assert (fast is None) == (found is None)
    if fast is None or found is None:
        return
    assert_follows_layout(fast)
    assert np.array_equal(found[1].numpy(), fast.payload)
    assert np.array_equal(decode(fast), weight)
    assert np.array_equal(fast_reference.decode(fast), weight)
    row = rng.integers(0, rows, 3)
    assert np.array_equal(decode_rows(fast, row), weight[row])


def test_gaussian_and_trained_like_weights_take_12_bits() -> None:
    assert encoded(gaussian(4096, 4096)).bits_per_weight < 12.01
    assert encoded(trained_like(1024, 2048)).bits_per_weight < 12.05


def test_chosen_rows_equal_the_rows_of_the_whole() -> None:
    weight = MATRICES["raw tiles"]
    rows = np.array([0, 640, 7, 7, 70, 130, 600], np.int64)
    assert np.array_equal(decode_rows(encoded(weight), rows), weight[rows])


@pytest.mark.parametrize("row", [-1, 37])
def test_a_row_outside_the_matrix_is_refused(row: int) -> None:
    with pytest.raises(IndexError, match=f"rows {row} to {row} asked for; the matrix has 37"):
        decode_rows(encoded(MATRICES["37 x 333"]), np.array([row]))


@pytest.mark.parametrize("start", [600, 0xFFFFFFFF])
def test_starts_that_contradict_each_other_are_reported(start: int) -> None:
    weight = MATRICES["raw tiles"].copy()
    weight[:64, :128] = 0  # raw, 4096 entries
    fast = encoded(weight)
    fast.starts[1] = start
    with pytest.raises(
        FormatError, match=r"tile 0 ended with status 2 \(2 of 99 did not end with 0\)"
    ):
        decode(fast)
    with pytest.raises(FormatError, match="row 0 ended with status 2"):
        decode_rows(fast, np.array([5]))


@pytest.mark.parametrize(
    "weight", [np.zeros(8, np.uint16), np.zeros((2, 2), np.float32)], ids=["1-D", "float32"]
)
def test_anything_but_a_matrix_of_16_bit_words_is_refused(weight: np.ndarray) -> None:
    with pytest.raises(UnsupportedError, match="expected the bits of a BF16 matrix"):
        encode(weight)
