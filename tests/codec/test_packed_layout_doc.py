"""docs/packed-layout.md is true: the encoder makes its worked example, which decodes to the stated weights."""

import re
from pathlib import Path

import numpy as np
import pytest
from packed_rules import assert_follows_layout

from vllm_dfloat.codec import decode, descriptor, reference
from vllm_dfloat.codec.encode import encode
from vllm_dfloat.codec.huffman import build_lut
from vllm_dfloat.codec.layout import (
    LANES,
    LAYOUT_VERSION,
    PAD_WORDS,
    STEPS,
    PackedLayout,
    PackedTensor,
)

DOC = (Path(__file__).parents[2] / "docs/packed-layout.md").read_text()


def line(label: str) -> list[str]:
    return re.search(rf"^    {label}: (.*)$", DOC, re.MULTILINE)[1].split()


CODES = {
    int(symbol): code for symbol, code in re.findall(r"^    (\d+): ([01]+)$", DOC, re.MULTILINE)
}
WEIGHTS = np.array([int(w, 16) for w in line("weights")], np.uint16)
MATRIX = np.tile(WEIGHTS, 1024).reshape(4, 2048)


def from_the_document() -> PackedTensor:
    """Build a payload only from the numbers in the document."""
    starts = [int(n) for n in line("tile starts")]
    layout = PackedLayout(4, 2048, starts[-1] + PAD_WORDS)
    packed = PackedTensor(layout, np.zeros(layout.num_bytes, np.uint8), "worked example")
    lengths = np.zeros(256, np.uint8)
    for symbol, code in CODES.items():
        lengths[symbol] = len(code)
    packed.lut[:] = build_lut(lengths, layout.code_bits)
    packed.sign_mantissa[:] = np.tile([int(w, 16) for w in line("sign_mantissa")], 2)
    packed.lane_lengths[:] = int(line("lane length")[0])
    packed.tile_starts[:] = starts
    stream = line("step")[0] * (STEPS * LANES * 4)
    packed.words[: starts[-1]] = [int(stream[i : i + 32], 2) for i in range(0, len(stream), 32)]
    return packed


@pytest.mark.parametrize("decoder", [reference.decode, decode.decode], ids=["oracle", "numba"])
def test_worked_example_decodes_to_its_stated_weights(decoder) -> None:
    packed = from_the_document()
    assert_follows_layout(packed)
    assert np.array_equal(decoder(packed), MATRIX)


def test_the_encoder_makes_the_bytes_of_the_worked_example() -> None:
    packed = encode(MATRIX)
    assert np.array_equal(packed.payload, from_the_document().payload)
    assert packed.num_bytes == int(re.search(r"= (\d+) bytes against", DOC)[1])
    assert "".join(CODES[int(w) >> 7 & 0xFF] for w in WEIGHTS) == line("step")[0]
    shown = "".join(line("lane words"))
    assert "".join(f"{int(w):08x}" for w in packed.words[:4]).startswith(shown)


def test_the_document_states_the_version_of_the_code() -> None:
    assert f"Layout version {LAYOUT_VERSION}," in DOC


def test_the_seal_of_a_descriptor_is_the_sum_that_the_document_gives() -> None:
    factors = [int(f, 16) for f in re.findall(r"word\d \* (0x[0-9A-F]{8})", DOC)]
    words = descriptor.words(0x7F00_1234_5670, (0, 510, 8), salt=-5)
    assert words[:3] == [0x7F00_1234_5670, 0, 510 | 8 << 32]
    expected = sum(f * word for f, word in zip(factors, words[:3], strict=True)) - 5
    assert (words[3] - expected) % (1 << 64) == 0
