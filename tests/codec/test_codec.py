"""Encoder, numba decoder and oracle on every kind of bit pattern; inputs that must be refused."""

import dataclasses
import os
from unittest import mock

import numpy as np
import pytest
from helpers import LIMITS, gaussian, hard_matrices, rare_symbols, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from packed_rules import assert_follows_layout

from vllm_dfloat.codec import reference
from vllm_dfloat.codec.decode import check_status, decode, decode_into, decode_rows
from vllm_dfloat.codec.encode import count_exponents, encode
from vllm_dfloat.codec.huffman import code_lengths
from vllm_dfloat.codec.layout import PackedTensor
from vllm_dfloat.errors import FormatError, UnsupportedError

HARD = hard_matrices()


@pytest.mark.parametrize("name", HARD)
def test_every_hard_matrix_comes_back_bit_for_bit(name: str) -> None:
    weight = HARD[name]
    packed = encode(weight, name)
    assert_follows_layout(packed)
    out = np.full(packed.layout.padded_numel, unlike(weight), np.uint16)
    status = np.full(packed.layout.num_tiles, -1, np.int32)
    decode_into(packed, out, status)
    assert not status.any()
    assert np.array_equal(out[: weight.size].reshape(weight.shape), weight)
    if weight.size < 70_000:  # the oracle is slow on purpose
        assert np.array_equal(reference.decode(packed), weight)


@pytest.mark.parametrize(("rare", "code_bits"), LIMITS)
def test_every_code_length_limit_decodes(rare: int, code_bits: int) -> None:
    weight = rare_symbols(rare)
    packed = encode(weight)
    assert not packed.is_raw
    assert packed.layout.code_bits == code_bits
    assert np.array_equal(decode(packed), weight)
    assert np.array_equal(reference.decode(packed), weight)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    stnp.arrays(
        np.uint16,
        st.tuples(st.integers(0, 40), st.integers(0, 130)),
        elements=st.integers(0, 65535),
    )
)
def test_decode_inverts_encode_for_any_bits(weight: np.ndarray) -> None:
    assert np.array_equal(decode(encode(weight)), weight)


def test_chosen_rows_equal_the_rows_of_the_whole() -> None:
    weight = gaussian(300, 777)
    rows = np.array([0, 299, 7, 7, 150, 1], np.int64)
    assert np.array_equal(decode_rows(encode(weight), rows), weight[rows])
    assert np.array_equal(
        decode_rows(encode(HARD["uniform bits"]), rows[:1]), HARD["uniform bits"][:1]
    )


@pytest.mark.parametrize("row", [-1, 300])
def test_a_row_outside_the_matrix_is_refused(row: int) -> None:
    with pytest.raises(IndexError, match=f"rows {row} to {row} asked for; the matrix has 300"):
        decode_rows(encode(gaussian(300, 50)), np.array([row], np.int64))


def official_bytes_at_least(weight: np.ndarray) -> int:
    """Return a lower bound of the official format's size: unlimited Huffman codes, without the end marker."""
    counts = count_exponents(weight.reshape(-1))
    code_bits = int(counts @ code_lengths(counts, 32).astype(np.int64))
    stream = -(-code_bits // 8)
    blocks = -(-stream // 4096)
    return (
        weight.size + stream + 320 * blocks + 4 * blocks + 2 * 256
    )  # gaps, positions, fewest tables


def test_size_is_below_the_goal_and_below_the_official_format() -> None:
    weight = gaussian(4096, 4096)
    packed = encode(weight)
    assert packed.bits_per_weight <= 10.85
    assert packed.num_bytes <= official_bytes_at_least(weight)


def test_a_matrix_that_would_not_shrink_stays_bf16_and_says_so() -> None:
    weight = HARD["uniform bits"]
    packed = encode(weight)
    assert packed.is_raw
    assert packed.num_bytes == 2 * packed.layout.padded_numel
    assert not encode(gaussian(64, 96)).is_raw


def test_the_same_bytes_come_out_whatever_the_number_of_threads() -> None:
    weight = gaussian(1024, 1500)
    payloads = []
    for threads in ("1", "3", "7"):
        with mock.patch.dict(os.environ, VLLM_DFLOAT_THREADS=threads):
            payloads.append(encode(weight).payload)
            assert np.array_equal(decode(encode(weight)), weight)
    assert np.array_equal(payloads[0], payloads[1])
    assert np.array_equal(payloads[0], payloads[2])


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(threads: str) -> None:
    with (
        mock.patch.dict(os.environ, VLLM_DFLOAT_THREADS=threads),
        pytest.raises(UnsupportedError, match=f"VLLM_DFLOAT_THREADS={threads}: expected"),
    ):
        encode(gaussian(1024, 1500))


@pytest.mark.parametrize(
    "weight", [np.zeros(5, np.uint16), np.zeros((2, 3), np.float32), np.zeros((1, 2, 3), np.uint16)]
)
def test_what_is_not_a_bf16_matrix_is_refused_by_name(weight: np.ndarray) -> None:
    with pytest.raises(UnsupportedError, match=r"the_name: .* expected the bits of a BF16 matrix"):
        encode(weight, "the_name")


def changed(packed: PackedTensor, section: str, index: int, value: int) -> PackedTensor:
    copy = dataclasses.replace(packed, payload=packed.payload.copy())
    getattr(copy, section).reshape(-1)[index] = value
    return copy


@pytest.mark.parametrize(
    ("section", "index", "value", "what"),
    [
        ("tile_starts", 0, 1, "words of all tiles"),
        ("tile_starts", -1, 5, "words of all tiles"),
        ("tile_starts", 1, 3, "words of each tile"),
        ("lane_lengths", 20, 255, "words of each tile"),
        ("lut", 9, 15, "the longest code"),
        ("words", -1, 1, "padding"),
    ],
)
def test_the_rules_of_the_layout_notice_what_contradicts_them(
    section: str, index: int, value: int, what: str
) -> None:
    packed = encode(gaussian(64, 96), "w")
    with pytest.raises(AssertionError, match=what):
        assert_follows_layout(changed(packed, section, index, value))
    short = dataclasses.replace(packed, payload=packed.payload[:-4])
    with pytest.raises(AssertionError, match="bytes of the payload"):
        assert_follows_layout(short)


def test_flipped_bits_anywhere_end_with_a_status_or_decode_and_never_read_outside() -> None:
    # Bug caught: a lane that starts past the words, or codes longer than the padding allows. The payload ends with its
    # allocation; the decoder must check its bounds itself, since numba does not.
    packed = encode(gaussian(100, 204), "w")
    rng = np.random.default_rng(1)
    reported = 0
    for _ in range(400):
        payload = packed.payload.copy()
        for position in rng.integers(0, payload.size, rng.integers(1, 9)):
            payload[position] ^= 1 << rng.integers(0, 8)
        broken = dataclasses.replace(packed, payload=payload)
        out = np.empty(packed.layout.padded_numel, np.uint16)
        status = np.full(packed.layout.num_tiles, -1, np.int32)
        decode_into(broken, out, status)
        assert (status >= 0).all()
        reported += bool(status.any())
    assert reported > 30  # most bytes are signs and mantissas, which contradict nothing


def test_a_status_is_reported_with_name_and_tile() -> None:
    with pytest.raises(FormatError, match=r"layer\.weight: tile 2 ended with status 1 \(1 of 4"):
        check_status(np.array([0, 0, 1, 0], np.int32), "layer.weight")
