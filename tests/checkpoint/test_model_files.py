"""Which files of a folder are the model: hidden files, two indices, a tensor in two files, shards that are missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_commands import only_line
from dfloat11_helpers import VECTORS
from safetensors.numpy import save_file

from vllm_dfloat.checkpoint.listing import INDEX_FILE
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.cli import main
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.errors import FormatError

SINGLE = VECTORS / "llama-tiny-single-bf16"
APPLE_DOUBLE = b"\x00\x05\x16\x07" + b"\0" * 4092
MEMORY = ("--gpu-memory", "1GiB")


def shards(folder: Path, stem: str, parts: list[dict[str, np.ndarray]], index: bool = True) -> None:
    """Write a series of files, and an index in which a tensor is in the first that holds it."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / name)
        for tensor in part:
            weight_map.setdefault(tensor, name)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )


def matrix(value: int) -> np.ndarray:
    return np.full((4, 8), value, np.uint16)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Give the real model of SINGLE in three shards with an index."""
    compress(open_source(SINGLE), tmp_path / "df11")
    decompress(tmp_path / "df11", tmp_path / "sharded", shard_bytes=300_000)
    (tmp_path / "sharded/config.json").write_bytes((SINGLE / "config.json").read_bytes())
    return tmp_path / "sharded"


def add_hidden_files(folder: Path) -> None:
    """Add hidden files as macOS writes them on other file systems, and a hidden folder as other tools leave it."""
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(APPLE_DOUBLE)
    (folder / "._layer_0.pkl").write_bytes(APPLE_DOUBLE)
    (folder / "._extra.safetensors.index.json").write_bytes(APPLE_DOUBLE)
    (folder / ".safetensors").write_bytes(APPLE_DOUBLE)
    (folder / ".cache").mkdir()
    shutil.copy(SINGLE / "model.safetensors", folder / ".cache/model.safetensors")


def copied_hidden_files(folder: Path) -> list[Path]:
    """Return the hidden files in a folder, except those in which a command records its progress."""
    return [file for file in folder.rglob(".*") if not file.name.startswith(".vllm-dfloat-")]


@pytest.mark.parametrize("has_manifest", [True, False])
def test_hidden_files_are_no_weights_for_any_command(
    has_manifest: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: one ._model_layers_0.safetensors made a DFloat11 folder unreadable.
    source = Path(shutil.copytree(SINGLE, tmp_path / "source"))
    add_hidden_files(source)
    target, again = tmp_path / "df11", tmp_path / "again"
    assert main(["compress", str(source), str(target)]) == 0
    assert not copied_hidden_files(target)
    add_hidden_files(target)
    if not has_manifest:
        (target / "dfloat11_manifest.json").unlink()
    for arguments in (
        ["inspect", target],
        ["verify", target],
        ["verify", target, "--against", source],
        ["decompress", target, again],
        ["inspect", source],
        ["verify", source],
    ):
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    assert not copied_hidden_files(again)
    assert compare(again, SINGLE).is_equal


def test_a_folder_of_hidden_weights_holds_none(tmp_path: Path) -> None:
    (tmp_path / "._model.safetensors").write_bytes(APPLE_DOUBLE)
    (tmp_path / "._pytorch_model.bin").write_bytes(APPLE_DOUBLE)
    with pytest.raises(FormatError, match=r"no \*.safetensors file"):
        bf16_tensors(tmp_path)


def test_of_two_indices_the_standard_one_says_what_the_model_is(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: both sets were compressed, twice the bytes, and the result did not serve.
    others = [{"layers.0.attention.wq.weight": matrix(1)}, {"norm.weight": matrix(2)}]
    shards(sharded, "consolidated", others)
    (sharded / "params.json").write_text('{"dim": 128}')
    assert main(["compress", str(sharded), str(tmp_path / "out")]) == 0
    for file in (tmp_path / "df11").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert main(["verify", str(tmp_path / "out"), "--against", str(sharded)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(sharded), "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["modules"]}
    assert names == bf16_tensors(SINGLE).keys()


def test_a_second_form_of_the_weights_is_left_out_without_an_index_too(tmp_path: Path) -> None:
    save_file({"a": matrix(1)}, tmp_path / "model.safetensors")
    shards(tmp_path, "consolidated", [{"b": matrix(1)}, {"c": matrix(2)}])
    assert bf16_tensors(tmp_path).keys() == {"a"}
    (tmp_path / "model.safetensors").unlink()  # then it is the model
    assert bf16_tensors(tmp_path).keys() == {"b", "c"}


def test_without_an_index_every_file_counts_as_for_vllm(tmp_path: Path) -> None:
    # Bug caught: with a model.safetensors no other file was read, so tensors that BF16 vLLM loads were missing.
    save_file({"a": matrix(1)}, tmp_path / "model.safetensors")
    save_file({"lm_head.weight": matrix(2)}, tmp_path / "lm_head.safetensors")
    assert bf16_tensors(tmp_path).keys() == {"a", "lm_head.weight"}


def test_two_indices_of_which_none_is_the_standard_one_are_refused(tmp_path: Path) -> None:
    for stem in ("one", "two"):
        shards(tmp_path, stem, [{"a": matrix(1)}])
    with pytest.raises(FormatError, match=r"holds 2 indices, such as one.* and two.*, and none is"):
        bf16_tensors(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_that_two_shards_hold_alike_is_one(index: bool, tmp_path: Path) -> None:
    # Bug caught: refused, with the advice to delete a shard that holds other weights.
    shards(tmp_path, "model", [{"a": matrix(1)}, {"a": matrix(1), "b": matrix(2)}], index)
    found = bf16_tensors(tmp_path)
    assert {name: tensor.file.name for name, tensor in found.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }


def test_the_index_says_which_of_two_equal_tensors_is_read(tmp_path: Path) -> None:
    shards(tmp_path, "model", [{"a": matrix(1)}, {"a": matrix(1), "b": matrix(2)}])
    second = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": second, "b": second, "c": second}})
    )
    with pytest.raises(FormatError, match=rf"^\S+/{INDEX_FILE}: says that 'c' is in {second}"):
        bf16_tensors(tmp_path)
    first = "model-00001-of-00002.safetensors"
    save_file({"a": matrix(1), "c": matrix(3)}, tmp_path / first)
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": {"a": second, "b": second, "c": first}})
    )
    assert bf16_tensors(tmp_path)["a"].file.name == second


@pytest.mark.parametrize("other", [matrix(2), matrix(1).astype(np.int16), matrix(1).reshape(8, 4)])
@pytest.mark.parametrize("command", ["compress", "inspect", "verify", "plan"])
def test_a_tensor_that_two_shards_hold_differently_is_refused_naming_both(
    command: str, other: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    shards(folder, "model", [{"a": matrix(1)}, {"a": other, "b": matrix(2)}])
    config = json.loads((SINGLE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    more = {"compress": [str(tmp_path / "t")], "plan": MEMORY}.get(command, [])
    assert main([command, str(folder), *more]) == 2
    line = only_line(capsys.readouterr().err)
    assert "model-00002-of-00002.safetensors: a: " in line
    assert (
        "model-00001-of-00002.safetensors holds a tensor of that name with other contents" in line
    )
    assert "remove" not in line.lower()


def test_a_series_of_shards_with_a_gap_is_refused_where_no_index_says_more(tmp_path: Path) -> None:
    parts = [{"a": matrix(1)}, {"b": matrix(2)}, {"c": matrix(3)}]
    shards(tmp_path, "model", parts, index=False)
    assert bf16_tensors(tmp_path).keys() == {"a", "b", "c"}
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"holds 2 of 3 files .* not model-00002-of-00003\.safe"):
        bf16_tensors(tmp_path)
