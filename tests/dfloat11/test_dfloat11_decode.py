"""Contents of a unit: errors found before decoding, and errors found by decoding."""

from pathlib import Path

import numpy as np
import pytest
from dfloat11_helpers import (
    VECTORS,
    edge_originals,
    encode,
    huffman_codes,
    make_luts,
    stored_unit,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.dfloat11 import reference
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.dfloat11.format import LENGTH_SHIFT, POINTER
from vllm_dfloat.dfloat11.tables import build_tables
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import FormatError


def load(tensors: dict[str, np.ndarray], path: Path, members: list[str] | None = None) -> Unit:
    return (
        open_checkpoint(write_checkpoint(path, {"u": tensors}, {"u": members or []}))
        .units["u"]
        .load()
    )


def edge_unit(name: str) -> Unit:
    return open_checkpoint(VECTORS / "edge-good-df11").units[name].load()


def _positions(*values: int) -> np.ndarray:
    return np.array(values, "<u4").view(np.uint8)


@pytest.mark.parametrize(
    ("row", "entry", "value", "message"),
    [
        (-1, 240, 1, r"luts: exponent 240 has a code of 1 bits; exponents from 240 on"),
        (-1, 255, 32, r"luts: exponent 255 has a code of 32 bits; exponents from 240 on"),
        (-1, 3, 33, r"luts: exponent 3 has a code of 33 bits; at most 32"),
        (-1, 3, 7, r"luts: exponent 3 has a code of 7 bits, but no table holds that code"),
        (0, 0, 240, r"luts: an entry refers to table 16; tables 1 to 1 are expected with 3 rows"),
        (1, 0, 254, r"luts: an entry refers to table 2; tables 1 to 1 are expected with 3 rows"),
    ],
)
def test_luts_that_no_code_book_has_are_refused(
    row: int, entry: int, value: int, message: str, tmp_path: Path
) -> None:
    stored = stored_unit("edge-good", "prime4099")
    stored["luts"][row, entry] = value
    with pytest.raises(FormatError, match=rf"^\S+/model.safetensors: u.{message}"):
        load(stored, tmp_path)


def test_luts_without_any_code_are_refused(tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "prime4099")
    stored["luts"][-1] = 0
    with pytest.raises(FormatError, match=r"u.luts: the last row has no code length"):
        load(stored, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 20000, 30000, 70001), "runs from 1 to 70001; 0 to 70001"),
        ((0, 30407, 60000, 70000), "runs from 0 to 70000; 0 to 70001"),
        ((0, 30407, 30406, 70001), "block 1 has -1 weights; 0 to 32768"),
        ((0, 30407, 30408, 70001), "block 2 has 39593 weights; 0 to 32768"),
        ((0, 30407, 70001), "block 1 has 39594 weights; 0 to 32768"),
    ],
)
def test_positions_that_contradict_the_sizes_are_refused(
    values: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    stored = stored_unit("edge-good", "one_bit_codes")
    stored["output_positions"] = _positions(*values)
    with pytest.raises(FormatError, match=f"u.output_positions: {message}"):
        load(stored, tmp_path)


@pytest.mark.parametrize("splits", [[0, 5], [5, 5], [6, 5], [5, 4105], [-1, 5], [5, 1 << 62]])
def test_splits_not_strictly_inside_are_refused(splits: list[int], tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "block")
    stored["split_positions"] = np.array(splits, np.int64)
    with pytest.raises(
        FormatError, match=r"u.split_positions: found \[.*strictly between 0 and 4105"
    ):
        load(stored, tmp_path, ["a", "b", "c"])


def test_positions_one_short_are_accepted() -> None:
    # Bug caught: a demand for B + 1 positions; official files have only B in one case.
    entry = open_checkpoint(VECTORS / "edge-good-df11").units["tail_straddle_block_short"]
    assert entry.fields["output_positions"].shape == (8,)
    assert edge_unit("tail_straddle_block_short").positions.tolist() == [0, 16325, 16325]


def test_stale_slots_mean_nothing(tmp_path: Path) -> None:
    exponents = np.array([120, 121, 122, 0, 0, 121, 118, 120, 121])
    bits = (exponents << 7).astype(np.uint16)
    stored = encode(bits)
    entries = build_tables(stored["luts"], "u")[0]
    assert np.flatnonzero(entries == 0).tolist() == list(range(224, 240))  # the end marker's, 1110
    for value in (0, 99, 118, 122, 239):
        stored["luts"][0, 224:240] = value
        unit = load(stored, tmp_path)
        assert np.array_equal(
            np.delete(unit.tables[0], range(224, 240)), np.delete(entries, range(224, 240))
        )
        assert np.array_equal(decode_unit(unit), bits)
        assert np.array_equal(reference.decode(unit), bits)


def test_code_behind_filler_of_its_own_value_is_found() -> None:
    # Bug caught: the leftmost run taken for the code. Here 00 is the end marker, whose table entries are 0
    # if the encoder has no end marker, and 01 is the code of exponent 0.
    bits = (np.array([0, 1, 1]) << 7).astype(np.uint16)
    stored = encode(bits)
    assert stored["luts"][0].tolist() == [0] * 128 + [1] * 128
    assert np.array_equal(decode_unit(_unit(stored)), bits)


def test_stale_pointers_are_not_followed() -> None:
    # Bug caught: a second pointer to the same table, or a pointer in a table of the last level, taken for valid.
    luts = edge_unit("codes_up_to_25_bits").luts.copy()
    tables = build_tables(luts, "u")
    free = np.flatnonzero(tables[3] == 0)  # in the only table of the fourth level
    luts[3, free[0]] = 255  # to a table that has its pointer already
    luts[3, free[1]] = 252  # to one that has none
    luts = np.insert(luts, 4, luts[1], axis=0)
    assert np.array_equal(build_tables(luts, "u")[:4], tables)
    assert (tables[:3] & POINTER).any(1).all()
    assert not (tables[3] & POINTER).any()


@pytest.mark.parametrize("name", ["nine", "rows18", "all_0_to_239", "codes_up_to_25_bits"])
def test_tables_hold_exactly_the_codes_of_the_code_book(name: str) -> None:
    codes = huffman_codes((edge_originals()[name] >> 7 & 0xFF).astype(np.int64))
    tables = build_tables(make_luts(codes), name)
    for symbol, (value, length) in codes.items():
        row, peek = 0, value << 32 - length
        for shift in (24, 16, 8, 0):
            entry = int(tables[row, peek >> shift & 0xFF])
            if not entry & POINTER:
                break
            row = entry & 0xFF
        assert entry == (symbol | length << LENGTH_SHIFT if symbol >= 0 else 0)


def test_data_that_reaches_an_entry_without_a_code_is_refused(tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "odd77")
    codes = huffman_codes((edge_originals()["odd77"] >> 7 & 0xFF).astype(np.int64))
    value, length = codes[-1]
    stored["encoded_exponent"][0:2] = np.array([value << 16 - length], ">u2").view(np.uint8)
    unit = load(stored, tmp_path)
    message = (
        r"^\S+/model.safetensors: u.encoded_exponent: window 0: after 0 codes of block 0 come bits"
    )
    with pytest.raises(FormatError, match=message):
        decode_unit(unit)


def test_gap_that_disagrees_with_the_codes_is_refused(tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "prime4099")
    stored["gaps"][1] ^= 0x20  # a bit of window 2: bits 10 to 14
    with pytest.raises(FormatError, match=r"window 1: the next window starts at its bit \d+; gaps"):
        decode_unit(load(stored, tmp_path))


def test_count_that_disagrees_with_the_positions_is_refused(tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "one_bit_codes")
    first = int(stored["output_positions"].view("<u4")[1])
    for shift in (-1, 1):
        stored["output_positions"].view("<u4")[1] = first + shift
        with pytest.raises(FormatError, match=f"block 0; output_positions says {first + shift}"):
            decode_unit(load(stored, tmp_path))


def test_stream_that_ends_before_its_last_code_is_refused(tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "prime4099")
    stored["encoded_exponent"] = stored["encoded_exponent"][:-2]
    with pytest.raises(FormatError, match=r"u.encoded_exponent: window 16\d: .* within 1320 bytes"):
        decode_unit(load(stored, tmp_path))


@pytest.mark.parametrize("name", ["codes_up_to_25_bits", "tail_straddle_block_short", "block"])
def test_any_range_equals_that_part_of_the_whole(name: str) -> None:
    unit, whole = edge_unit(name), edge_originals()[name]
    rng = np.random.default_rng(0)
    edges = [*unit.positions.tolist(), *rng.integers(0, len(whole), 20).tolist()]
    for start in edges[::3]:
        for stop in edges:
            if start <= stop:
                assert np.array_equal(decode_unit(unit, start, stop), whole[start:stop])
    with pytest.raises(ValueError, match=r"weights 5\.\.4 of"):
        decode_unit(unit, 5, 4)
    with pytest.raises(ValueError, match=r"weights 0\.\."):
        decode_unit(unit, 0, len(whole) + 1)


def test_number_of_threads_does_not_change_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32) * np.float32(
        0.02
    )
    bits = (normal.view(np.uint32) >> 16).astype(np.uint16)
    unit = load(encode(bits), tmp_path)
    for threads in ("1", "3"):
        monkeypatch.setenv("VLLM_DFLOAT_THREADS", threads)
        assert np.array_equal(decode_unit(unit), bits)


def test_damage_in_one_thread_s_part_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = (np.random.default_rng(0).integers(100, 116, 3_000_000) << 7).astype(np.uint16)
    stored = encode(bits)
    stored["encoded_exponent"][-100_000] ^= 0xFF
    monkeypatch.setenv("VLLM_DFLOAT_THREADS", "3")
    with pytest.raises(FormatError):
        decode_unit(load(stored, tmp_path))


# Exponents below 240, in proportions from flat to very skewed; at least two different ones (the format's
# encoder cannot make a code book of one symbol).
_EXPONENTS = hnp.arrays(
    np.uint8,
    st.integers(2, 3000),
    elements=st.one_of(st.integers(0, 239), st.integers(118, 122), st.just(120)),
).filter(lambda array: len(np.unique(array)) > 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(_EXPONENTS, st.integers(0, 2**32 - 1))
def test_decoders_return_what_was_encoded(exponents: np.ndarray, seed: int) -> None:
    rest = np.random.default_rng(seed).integers(0, 256, exponents.size)
    bits = ((rest & 0x80) << 8 | exponents.astype(np.int64) << 7 | rest & 0x7F).astype(np.uint16)
    stored = encode(bits)
    if len(stored["luts"]) > 18:
        return
    unit = _unit(stored)
    assert np.array_equal(decode_unit(unit), bits)
    assert np.array_equal(reference.decode(unit), bits)


def _unit(stored: dict[str, np.ndarray]) -> Unit:
    numel = stored["sign_mantissa"].size
    positions = stored["output_positions"].view("<u4").astype(np.int64)
    if positions.size == -(-stored["encoded_exponent"].size // 4096):
        positions = np.append(positions, numel)
    return Unit(
        "u", "u", stored["encoded_exponent"], stored["sign_mantissa"], stored["gaps"], positions,
        np.array([0, numel]), stored["luts"], build_tables(stored["luts"], "u"),
    )  # fmt: skip
