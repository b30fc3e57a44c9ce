"""docs/fast-layout.md is true: its worked example decodes, the encoder makes it, and its times are the raw ones."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vllm_dfloat.codec import fast_decode, fast_reference
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.codec.fast_layout import FAST_LAYOUT_VERSION, FastLayout, FastTensor

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/fast-layout.md").read_text()
RESULT = "scripts/results/nvidia-h100-80gb-hbm3/fast-2026-11-27/fast_decode.json"
BEST = "prmt r16/4 t4 a8 w4"


def line(label: str) -> list[str]:
    return re.search(rf"^    {label}: (.*)$", DOC, re.MULTILINE)[1].split()


def words(label: str) -> np.ndarray:
    return np.array([int(word, 16) for word in line(label)], np.uint32)


MATRIX = np.tile(words("weights").astype(np.uint16), 16).reshape(8, 32)
MATRIX[2, 21] = 0x0001


def from_the_document() -> FastTensor:
    """Build a payload only from the numbers in the document."""
    entries = words("entries")
    layout = FastLayout(8, 32, int(line("base")[0]), entries.size)
    fast = FastTensor(layout, np.zeros(layout.num_bytes, np.uint8), "worked example")
    low = fast.low.view(np.uint32).reshape(8, 2, 4)
    low[:], fast.high[:] = words("low words"), words("high words")
    low[2, 1], fast.high[2, 1] = words("escaped low words"), words("escaped high words")
    fast.starts[:] = [int(start) for start in line("starts")]
    fast.entries[:] = entries
    return fast


@pytest.mark.parametrize(
    "decode", [fast_reference.decode, fast_decode.decode], ids=["oracle", "numba"]
)
def test_worked_example_decodes_to_its_stated_weights(decode) -> None:
    assert np.array_equal(decode(from_the_document()), MATRIX)


def test_the_encoder_makes_the_bytes_of_the_worked_example() -> None:
    fast = encode(MATRIX)
    assert fast is not None
    assert np.array_equal(fast.payload, from_the_document().payload)
    assert fast.layout.base == int(line("base")[0])
    assert fast.num_bytes == int(re.search(r"= (\d+) bytes against", DOC)[1])


def test_the_document_states_the_version_of_the_code() -> None:
    assert f"Fast layout version {FAST_LAYOUT_VERSION}," in DOC


def test_the_times_are_those_of_the_raw_result() -> None:
    assert RESULT in DOC
    rows = json.loads((ROOT / RESULT).read_text())["rows"]
    found = {(row["case"], row["name"]): row for row in rows}
    stated = re.findall(
        r"^\| (\d+ x 4096) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", DOC, re.MULTILINE
    )
    assert len(stated) == 4
    for case, *cells in stated:
        copy, best = found[case, "copy of the bytes read and written"], found[case, BEST]
        assert [float(cell) for cell in cells] == [
            copy["us"], best["us"], best["gb_per_s"], best["of_copy"],
        ]  # fmt: skip
