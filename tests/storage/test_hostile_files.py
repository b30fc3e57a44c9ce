"""Files made to hang, crash or mislead their reader; a fuzz run or a review has found each case."""

import json
import os
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dfloat11_helpers import config, encode, stored_unit, write_checkpoint
from safetensors.numpy import save_file

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, read_manifest
from vllm_dfloat.checkpoint.members import plan
from vllm_dfloat.checkpoint.patterns import compile_patterns
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.verify import check
from vllm_dfloat.errors import MAX_MESSAGE, DFloatError, FormatError, UnsupportedError
from vllm_dfloat.plan.config import read_model_config
from vllm_dfloat.storage.safetensors_read import read_header


@pytest.fixture
def one_unit(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", {"odd77": stored_unit("edge-good", "odd77")})


def replace(file: Path, kind: str) -> None:
    """Put something that is no regular file in the place of `file`."""
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        target = {"device": "/dev/zero", "loop": file.name, "dangling": "nowhere"}[kind]
        file.symlink_to(target)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "dangling"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST_FILE])
def test_what_is_no_regular_file_is_refused_unread(name: str, kind: str, one_unit: Path) -> None:
    # Bugs caught: an endless wait for a pipe's writer; a config treated as missing, so that nothing is compressed.
    replace(one_unit / name, kind)
    with pytest.raises(FormatError, match=rf"^{re.escape(str(one_unit / name))}: "):
        open_checkpoint(one_unit)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "dangling"])
def test_an_index_that_is_no_regular_file_is_refused_unread(kind: str, tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    replace(index, kind)
    with pytest.raises(FormatError, match=rf"^{re.escape(str(index))}: "):
        bf16_tensors(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "/etc/passwd"},
        {"a": "../model.safetensors"},
        {"a": "x" * 5000 + ".safetensors"},  # Bug caught: OSError, file name too long
        {"a": "model\0.safetensors"},
        {"a": "config.json"},
        {"a": 5},
        {"a": None},
        {"a": ["model.safetensors"]},
        ["a"],
        None,
        {"b": "model.safetensors"},  # Bug caught: a tensor that no file holds went unnoticed
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match=r"^\S+/model.safetensors.index.json: "):
        bf16_tensors(tmp_path)
    index.write_text("[" * 100_000)  # Bug caught: RecursionError
    with pytest.raises(FormatError, match=r"^\S+/model.safetensors.index.json: is not valid JSON"):
        bf16_tensors(tmp_path)


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(name: str, shape: str = "[0]", dtype: str = '"U8"') -> bytes:
    return f'{{"{name}": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": [0, 0]}}}}'.encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (entry("a" * 100_000), "100000 characters"),
        (entry("layers." + "9" * 5000 + ".weight"), "5014 characters"),  # int() refused it later
        (entry("\\ud800"), "1 characters"),  # Bug caught: UnicodeEncodeError where it is printed
        (entry("a\\nvllm-dfloat: all is well"), "printable"),
        (entry(""), "0 characters"),
        (
            entry("a", f"[0, {2**62}, {2**62}]"),
            "product is below",
        ),  # Bug caught: NumPy's ValueError
        (
            entry("a", dtype="[" * 400 + "]" * 400),
            "dtype a list of 1",
        ),  # Bug caught: RecursionError
        (entry("a", dtype='"' + "U" * 100_000 + '"'), "dtype 'UUU"),
    ],
)
def test_names_shapes_and_dtypes_that_nothing_can_hold_are_refused(
    header: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw(header))
    with pytest.raises(DFloatError, match=message) as error:
        read_header(file)
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= MAX_MESSAGE


def test_a_message_is_one_printable_line_of_bounded_length_that_ends_with_what_was_wrong() -> None:
    text = str(FormatError("file\n\x1b[31m\ud800" + "x" * 10**6 + ": found 1; expected 2."))
    assert text.startswith("file\\n\\x1b[31m\\ud800xxx")
    assert text.endswith("xxx: found 1; expected 2.")
    assert text.isprintable()
    assert len(text) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:a|aa)" * 30 + "b",  # Bug caught: 2**30 ways, for minutes
        ".*.*.*" + "a" * 240 + "b",
        "(?:a|aa)" * 10 + ".*.*.*b",
    ],
)
def test_patterns_with_too_many_ways_to_match_a_path_are_refused(pattern: str) -> None:
    patterns = compile_patterns({pattern: []}, "config.json: pattern_dict")
    with pytest.raises(UnsupportedError, match=r"^config.json: pattern_dict: matching 1 patterns"):
        patterns.check_steps(["a" * 256])


def test_many_patterns_that_each_are_cheap_enough_are_refused_together() -> None:
    # Bug caught: 256 patterns of 20 million steps each, for every unit.
    patterns = compile_patterns({f".*.*.*{i}": [] for i in range(256)}, "config.json")
    with pytest.raises(UnsupportedError, match="matching 256 patterns"):
        patterns.check_steps(["a" * 256])


def test_patterns_of_a_large_mixture_of_experts_are_accepted() -> None:
    blocks = "|".join(str(i) for i in range(60))
    patterns = compile_patterns(
        {
            rf"model\.layers\.(?:{blocks})\.mlp\.experts\.\d+": ["up_proj", "down_proj"],
            r"model\.layers\.\d+": ["self_attn.q_proj"],
            r"model\.layers\.\d+\.mlp\.shared_experts\.\d+": ["up_proj"],
        },
        "config.json",
    )
    paths = [f"model.layers.{i}.mlp.experts.{j}" for i in range(60) for j in range(384)]
    patterns.check_steps(paths)
    assert patterns.members(paths[-1]) == ("up_proj", "down_proj")


@pytest.mark.parametrize(
    "members", [["a", "a"], [""], ["a\n"], ["x" * 300], [f"m{i}" for i in range(5000)]]
)
def test_lists_of_weights_that_are_none_are_refused(members: list[str]) -> None:
    # Bug caught: a weight returned twice with the same name.
    with pytest.raises(DFloatError, match=r"^config.json: 'u': lists "):
        compile_patterns({"u": members}, "config.json")


def test_a_weight_in_two_units_is_refused(tmp_path: Path) -> None:
    # Bug caught: both were returned, and the later one was used.
    unit = encode(np.arange(100, dtype=np.uint16) + 0x3F00)
    patterns = {"a": ["b.c"], "a.b": ["c"]}
    write_checkpoint(tmp_path, {"a": unit, "a.b": unit}, patterns)
    with pytest.raises(FormatError, match=r"its weight a.b.c.weight is also in the unit a"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"files": []},
        {"tensors": None},
        {"files": {"../config.json": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a\0": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": True, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": 1.0, "sha256": "0" * 64}}},
        {"files": {"a": {"bytes": 1, "sha256": "0" * 63}}},
        {"files": {"a": {"bytes": 1}}},
        {"tensors": {"a": [1] * 50 + [77]}},  # Bug caught: more dimensions than an array can have
        {"tensors": {"a": [-1, -77]}},
        {"tensors": {"a": [7.0, 11.0]}},
        {"tensors": {"a": [1 << 62, 1 << 62]}},
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    content = {"version": 1, "files": {}, "tensors": {}, **change}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=rf"^\S+/{MANIFEST_FILE}: .* Remove it"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("value", [[[[1]]], {"a": 1}, "x" * 10_000, [512] * 10_000])
@pytest.mark.parametrize("key", ["version", "threads_per_block", "bytes_per_thread"])
def test_settings_of_any_size_are_refused_in_a_short_sentence(
    key: str, value: Any, one_unit: Path
) -> None:
    if key == "version":
        value = [value]
    whole = {"dfloat11_config": {**config({"odd77": []}), key: value}}
    (one_unit / "config.json").write_text(json.dumps(whole))
    with pytest.raises(
        DFloatError, match=rf"^\S+/config.json: dfloat11_config: {key} is "
    ) as error:
        open_checkpoint(one_unit)
    assert len(str(error.value)) < 300


def test_plan_refuses_a_config_that_is_a_pipe_or_nested_without_end(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    os.mkfifo(file)
    with pytest.raises(
        FormatError, match=rf"^{re.escape(str(file))}: is a directory, pipe or device"
    ):
        read_model_config(file)
    other = tmp_path / "other.json"
    other.write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"^\S+/other.json: is not valid JSON"):
        read_model_config(other)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_hole_in_a_file_takes_no_memory(name: str, one_unit: Path) -> None:
    # Bug caught: 100 MB of zeros read from a sparse file that takes a few kilobytes on disk.
    file = one_unit / name
    content = bytearray(file.read_bytes())
    if name == "model.safetensors":
        content[:8] = (10**8).to_bytes(8, "little")
    file.write_bytes(content)
    os.truncate(file, 1 << 40 if name == "model.safetensors" else 15 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=rf"^\S+/{name}: holds a zero byte"):
            open_checkpoint(one_unit)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_verify_decodes_an_lm_head_that_config_ties_too(tmp_path: Path) -> None:
    # Bug caught: "decode without an error", though one unit was never decoded.
    unit = encode(np.arange(1000, dtype=np.uint16) % 512 + 0x3F00)
    unit["encoded_exponent"] = np.full_like(unit["encoded_exponent"], 0xFF)
    write_checkpoint(tmp_path, {"lm_head": unit})
    whole = {"dfloat11_config": config({"lm_head": []}), "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(
        FormatError, match=r"^\S+/model.safetensors: lm_head.encoded_exponent: window "
    ):
        check(tmp_path)


def test_a_unit_that_shapes_make_the_weight_stored_beside_it_is_refused(tmp_path: Path) -> None:
    # Bug caught: two tensors of one name; decompress wrote one into the header, but the data of both.
    unit = encode(np.arange(100, dtype=np.uint16) + 0x3F00)
    write_checkpoint(tmp_path, {"a": unit}, {"a": ["b"]})
    save_file({"a.weight": np.zeros((10, 10), np.uint16)}, tmp_path / "plain.safetensors")
    with pytest.raises(
        FormatError, match=r"plain.safetensors: a.weight: the weight a.weight is also"
    ):
        plan(open_checkpoint(tmp_path), {"a": (10, 10)})
