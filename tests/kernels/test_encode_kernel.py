"""The encoding kernels, in Triton's interpreter: the same bytes as the CPU encoder, for every matrix."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import LIMITS, gaussian, hard_matrices, rare_symbols, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dfloat.codec import layout
from vllm_dfloat.codec.encode import encode, layout_for
from vllm_dfloat.codec.huffman import code_lengths
from vllm_dfloat.device import ops, packed_encode
from vllm_dfloat.errors import DeviceError, UnsupportedError
from vllm_dfloat.kernels import packed_encode as kernels

HARD = hard_matrices()


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """Fill every torch.empty with values that no encoder writes, so that a missed section is seen."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **options).fill_(0x5A)

    with mock.patch.object(torch, "empty", poisoned):
        yield


def assert_same_bytes(weight: torch.Tensor) -> layout.PackedLayout:
    expected = encode(weight.contiguous().view(torch.uint16).numpy(), "w")
    lay, payload = packed_encode.encode(weight, "w")
    assert lay == expected.layout
    assert payload.dtype == torch.uint8
    assert np.array_equal(payload.numpy(), expected.payload)
    return lay


@pytest.mark.parametrize("name", HARD)
def test_kernels_give_the_bytes_of_the_cpu_encoder(name: str) -> None:
    assert_same_bytes(to_torch(HARD[name]))


@pytest.mark.parametrize(
    "numel", [2046, 2047, 2048, 2049, 4095, 4096, 4097, 5 * 2048, 9 * 2048 + 1]
)
def test_bytes_are_the_same_around_the_borders_of_tiles_and_programs(numel: int) -> None:
    # Bug caught: a program past the end, or a last tile with another padding.
    assert_same_bytes(to_torch(gaussian(1, numel, seed=numel)))


def test_device_that_miscounts_is_told_of_in_a_sentence() -> None:
    # Bug caught: StopIteration from the choice of a code.
    with (
        mock.patch.object(kernels, "count_exponents"),  # counts nothing
        pytest.raises(DeviceError, match=r"w: the device counted -?\d+ exponents; expected 6"),
    ):
        packed_encode.encode(to_torch(gaussian(2, 3, seed=1)), "w")


@pytest.mark.parametrize(("rare", "code_bits"), LIMITS)
def test_codes_that_use_all_their_bits_are_joined_without_loss(rare: int, code_bits: int) -> None:
    # Bug caught: more codes joined than fit: the length bits of a table entry were still among the code bits.
    lay = assert_same_bytes(to_torch(rare_symbols(rare)))
    assert lay.code_bits == code_bits
    assert not lay.is_raw


def test_matrices_that_are_not_contiguous_or_not_aligned_are_encoded_in_row_order() -> None:
    weight = to_torch(gaussian(60, 90))
    assert_same_bytes(weight.t())
    assert_same_bytes(weight[:, 3:80])
    assert_same_bytes(weight.view(-1)[3:5303].view(53, 100))


@settings(max_examples=15, deadline=None)
@given(
    numel=st.integers(1, 3 * layout.TILE_WEIGHTS),
    spread=st.integers(1, 256),
    skew=st.floats(0.001, 0.9),
    seed=st.integers(0, 1 << 16),
)
def test_bytes_are_the_same_for_random_histograms(
    numel: int, spread: int, skew: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    symbols = rng.permutation(256)[np.minimum(rng.geometric(skew, numel), spread) - 1]
    noise = rng.integers(0, 1 << 16, numel) & 0x807F
    assert_same_bytes(to_torch((symbols << 7 | noise).astype(np.uint16)[None]))


WIDE = np.random.default_rng(0).integers(0, 1 << 16, (3, 2048)).astype(np.uint16)
COUNTED = {
    "gaussian": gaussian(5, 2048),
    "every exponent": WIDE,
    "half zeros": np.where(WIDE & 1, gaussian(3, 2048), np.uint16(0)),
    "zeros": np.zeros((2, 2048), np.uint16),
    "largest exponent": np.full((32, 2048), 0x7F81, np.uint16),
    "larger ones in later tiles": np.concatenate([gaussian(2, 2048) & 0xBFFF, WIDE]),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize(("by_window", "tiles_per_program"), [(True, 1), (True, 40), (False, 2)])
def test_counts_are_added_in_64_bits_whatever_the_form_and_the_number_of_tiles_per_program(
    name: str, by_window: bool, tiles_per_program: int
) -> None:
    # Bug caught: a matrix of more than 2**31 weights, most of them with one exponent; a counter of 8 bits that is full.
    weight = COUNTED[name]
    counts = torch.full((256,), 1 << 33)
    kernels.count_exponents(to_torch(weight).view(-1), counts, tiles_per_program, by_window)
    expected = np.bincount((weight.reshape(-1) >> 7) & 0xFF, minlength=256)
    assert np.array_equal(counts.numpy() - (1 << 33), expected)


@pytest.mark.parametrize("tiles_per_program", [1, 2, 16])
def test_the_kernels_touch_their_own_tiles_only(tiles_per_program: int) -> None:
    # Bug caught: a tile's index among the given tiles taken for its index in the matrix.
    weight = gaussian(5, 2048)
    expected = encode(weight)
    lengths = code_lengths(np.bincount((weight.reshape(-1) >> 7) & 0xFF, minlength=256), 8)
    table = torch.from_numpy(packed_encode._table(lengths))
    lengths = torch.full((7, layout.LANES), 99, dtype=torch.uint8)
    num_words = torch.full((7,), -9, dtype=torch.int32)
    tiles = to_torch(weight).view(-1)
    kernels.measure(tiles, 1, table, lengths, num_words, tiles_per_program)
    assert np.array_equal(lengths[1:6].numpy(), expected.lane_lengths)
    assert (lengths[[0, 6]] == 99).all()
    assert np.array_equal(num_words[1:6].numpy(), np.diff(expected.tile_starts))
    assert (num_words[[0, 6]] == -9).all()

    starts = torch.zeros(8, dtype=torch.int32)
    starts[1:7] = 3 + torch.from_numpy(expected.tile_starts.astype(np.int32))
    words = torch.zeros(3 + expected.words.size, dtype=torch.uint32)
    plane = torch.full((7 * 512,), 0x5A5A5A5A, dtype=torch.uint32)
    kernels.write(
        tiles, 1, table, lengths, starts, plane, words, tiles_per_program=tiles_per_program
    )
    assert not words[:3].any()
    assert np.array_equal(words[3:].numpy(), expected.words)
    assert np.array_equal(plane[512 : 6 * 512].numpy(), expected.sign_mantissa.reshape(-1))
    assert (plane.view(7, 512)[[0, 6]].numpy() == 0x5A5A5A5A).all()


def test_a_cpu_matrix_is_packed_by_the_cpu_encoder_whatever_the_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: loading on a CPU through the interpreter, minutes per layer.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setattr(packed_encode, "encode", None)
    weight = gaussian(64, 96)
    assert np.array_equal(ops.pack(to_torch(weight)).payload.numpy(), encode(weight).payload)


def test_more_words_than_the_layout_addresses_are_refused_by_name() -> None:
    # Both the GPU encoder and the CPU encoder call this when they know the number of words.
    raw = layout.PackedLayout(1 << 20, 1 << 14, 0)
    most = layout.MAX_WORDS - layout.PAD_WORDS - 1
    assert layout_for(raw, most, "w").num_words == layout.MAX_WORDS - 1
    with pytest.raises(UnsupportedError, match=r"lm_head: 2147483648 words of code; .* fewer than"):
        layout_for(raw, most + 1, "lm_head")


def test_without_triton_one_sentence_names_the_device_and_says_what_to_install() -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from vllm_dfloat import errors\n"
        "from vllm_dfloat.device import packed_encode as device_encode\n"
        "try:\n"
        "    device_encode.encode(torch.zeros(4, 4).bfloat16())\n"
        "except errors.DeviceError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == (
        "cpu: Triton cannot be imported (import of triton halted; None in sys.modules); dfloat11's GPU kernels "
        "need it. Install triton."
    ), run.stderr
