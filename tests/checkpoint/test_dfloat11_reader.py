"""Opening a checkpoint directory: names, files, headers, and refusals."""

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dfloat11_helpers import VECTORS, config, stored_unit, write_checkpoint
from safetensors.numpy import load_file, save_file

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.tied import ties_embeddings
from vllm_dfloat.errors import DFloatError, FormatError, UnsupportedError
from vllm_dfloat.storage.safetensors_read import read_header

LLAMA_UNITS = {"lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1"}


@pytest.fixture
def one_unit(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"odd77": stored_unit("edge-good", "odd77")})


def test_directory_mode_finds_units_and_plain_tensors_over_all_files() -> None:
    checkpoint = open_checkpoint(VECTORS / "llama-tiny-df11")
    assert set(checkpoint.units) == LLAMA_UNITS
    assert set(checkpoint.plain) == {
        "model.norm.weight",
        *(
            f"model.layers.{i}.{n}_layernorm.weight"
            for i in (0, 1)
            for n in ("input", "post_attention")
        ),
    }
    assert ties_embeddings(checkpoint.config) is False


def test_single_file_mode_finds_the_same_kind_of_units() -> None:
    checkpoint = open_checkpoint(VECTORS / "llama-tiny-single-df11")
    assert set(checkpoint.units) == LLAMA_UNITS - {"model.layers.1"}
    assert ties_embeddings(checkpoint.config) is None


def test_file_names_and_grouping_carry_no_meaning(tmp_path: Path) -> None:
    # Bug caught: a reader that expects one unit per file, or trusts an index.
    stored = stored_unit("edge-good", "odd77")
    halves = [dict(list(stored.items())[:3]), dict(list(stored.items())[3:])]
    for number, half in enumerate(halves):
        tensors = {f"odd77.{field}": array for field, array in half.items()}
        save_file(tensors, tmp_path / f"any_name_{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("not even JSON")
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config({"odd77": []})}))
    entry = open_checkpoint(tmp_path).units["odd77"]
    assert entry.load().num_weights == 77
    assert {tensor.file.name for tensor in entry.fields.values()} == {
        "any_name_0.safetensors",
        "any_name_1.safetensors",
    }


def test_unit_without_a_pattern_is_refused(tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "odd77")
    write_checkpoint(tmp_path, {"odd77": stored}, {"other": []})
    with pytest.raises(FormatError, match=r"^\S+/model.safetensors: odd77: no key .* \['other'\]"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "field",
    ["encoded_exponent", "sign_mantissa", "luts", "output_positions", "gaps", "split_positions"],
)
def test_unit_with_a_missing_tensor_is_refused(field: str, tmp_path: Path) -> None:
    stored = stored_unit("edge-good", "odd77")
    del stored[field]
    write_checkpoint(tmp_path, {"odd77": stored})
    with pytest.raises(FormatError, match=f"model.safetensors: odd77: found .* without {field};"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "array", "message"),
    [
        ("encoded_exponent", np.zeros(4097, np.uint8), r"gaps: found 320; expected 640 bytes"),
        ("encoded_exponent", np.zeros(0, np.uint8), r"encoded_exponent: found 0; expected 1 to"),
        ("encoded_exponent", np.zeros(25, np.int8), r"encoded_exponent: I8 \[25\]; U8 with 1"),
        ("encoded_exponent", np.zeros(9, np.uint8), r"sign_mantissa: found 77; expected 1 to 72"),
        ("sign_mantissa", np.zeros(0, np.uint8), r"sign_mantissa: found 0; expected 1 to 200"),
        ("sign_mantissa", np.zeros((77, 1), np.uint8), r"sign_mantissa: U8 \[77, 1\]; U8 with 1 d"),
        ("luts", np.zeros((1, 256), np.uint8), r"luts: found 1; expected 2 to 18 rows"),
        ("luts", np.zeros((19, 256), np.uint8), r"luts: found 19; expected 2 to 18 rows"),
        ("luts", np.zeros((2, 255), np.uint8), r"luts: found 255; expected rows of 256"),
        (
            "output_positions",
            np.zeros(12, np.uint8),
            r"output_positions: found 12; expected 8 \(or 4",
        ),
        ("output_positions", np.zeros(2, np.uint32), r"output_positions: U32 \[2\]; U8 with 1"),
        ("gaps", np.zeros(319, np.uint8), r"gaps: found 319; expected 320 bytes"),
        (
            "split_positions",
            np.array([5, 9]),
            r"split_positions: found 2; expected 0 for 1 weights",
        ),
        ("split_positions", np.zeros(0, np.int32), r"split_positions: I32 \[0\]; I64 with 1"),
    ],
)
def test_tensor_of_a_wrong_dtype_or_size_is_refused_when_opened(
    field: str, array: np.ndarray, message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, {"odd77": stored_unit("edge-good", "odd77") | {field: array}})
    with pytest.raises(FormatError, match=rf"^\S+/model.safetensors: odd77.{message}"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_files_is_refused(one_unit: Path) -> None:
    shutil.copy(one_unit / "model.safetensors", one_unit / "again.safetensors")
    with pytest.raises(
        FormatError, match=r"model.safetensors: odd77\.\w+: the tensor is also in again.safetensors"
    ):
        open_checkpoint(one_unit)


def test_weight_stored_both_plain_and_compressed_is_refused(one_unit: Path) -> None:
    save_file({"odd77.weight": np.zeros((1, 77), np.uint16)}, one_unit / "plain.safetensors")
    with pytest.raises(
        FormatError, match=r"plain.safetensors: odd77.weight: .* unit odd77 \(model"
    ):
        open_checkpoint(one_unit)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_legacy_pickle_layout_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for name in ("layer_0.pkl", "lm_head.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(_Bomb(touched)))
    for text in (None, "{}"):
        if text:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UnsupportedError, match=r"found layer_0.pkl .* legacy DFloat11 0.1.0"):
            open_checkpoint(tmp_path)
    assert not touched.exists()


def test_directory_without_dfloat11_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"found no config.json and 0 \*.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FormatError, match=r"found a config.json without dfloat11_config"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match="not a directory"):
        open_checkpoint(tmp_path / "config.json")


def test_directory_with_config_and_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dfloat11_config": config({})}))
    with pytest.raises(FormatError, match=r"no \*.safetensors file beside it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '"\xff"', "9" * 10_000])
def test_config_that_is_not_a_json_object_is_refused(text: str, one_unit: Path) -> None:
    (one_unit / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"^\S+/config.json: "):
        open_checkpoint(one_unit)


def _raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "announce a header of 0 bytes, but the file has 0"),
        (b"\0\0\0", "the file has 3 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", f"announce a header of {1 << 63} bytes"),
        (_raw(b"{"), "the header is not valid JSON"),
        (_raw(b"[" * 100_000), "the header is not valid JSON"),
        (_raw([1]), "the header is a list"),
        (_raw(b'{"a": 1, "a": 1}'), "names a tensor twice"),
        (_raw({"a": {"dtype": "U8"}}), "a: the header entry must hold"),
        (_raw({"a": _entry(0, 4, "U7")}, b"1234"), "a: dtype 'U7'; known are"),
        (_raw({"a": _entry(0, 4)}, b"123"), "describes .* bytes, but the file has"),
        (_raw({"a": _entry(0, 4)}, b"12345"), "describes .* bytes, but the file has"),
        (_raw({"a": _entry(0, 4, shape=[5])}, b"1234"), r"span 4 bytes; U8 \[5\] takes 5"),
        (_raw({"a": _entry(0, 4, shape=[-4])}, b"1234"), "must be lists of sizes"),
        (_raw({"a": _entry(0, 4, shape=[True])}, b"1234"), "must be lists of sizes"),
        (_raw({"a": _entry(0, 2), "b": _entry(1, 3)}, b"123"), "neither holes nor overlaps"),
        (_raw({"a": _entry(0, 1), "b": _entry(2, 3)}, b"123"), "neither holes nor overlaps"),
    ],
)
def test_damaged_safetensors_file_is_refused_by_name(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model_layers_0.safetensors"
    file.write_bytes(content)
    with pytest.raises(DFloatError, match=message) as error:
        read_header(file)
    assert str(error.value).startswith(f"{file}: ")


def test_header_reader_agrees_with_the_safetensors_library() -> None:
    file = VECTORS / "edge-good-df11" / "model.safetensors"
    ours, theirs = read_header(file), load_file(file)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].bits().dtype == array.dtype
        assert np.array_equal(ours[name].bits(), array)


def test_file_that_shrinks_after_opening_is_refused_when_read(one_unit: Path) -> None:
    checkpoint = open_checkpoint(one_unit)
    (one_unit / "model.safetensors").write_bytes(b"short")
    with pytest.raises(FormatError, match=re.escape("was changed after it was opened")):
        checkpoint.validate()


def test_reading_and_changing_a_tensor_leaves_the_file_alone(one_unit: Path) -> None:
    before = (one_unit / "model.safetensors").read_bytes()
    open_checkpoint(one_unit).units["odd77"].fields["sign_mantissa"].bits()[:] = 0xAA
    assert (one_unit / "model.safetensors").read_bytes() == before
