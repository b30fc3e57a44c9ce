"""`vllm-dfloat verify` without --against: every file against the manifest."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dfloat11_helpers import stored_unit, write_checkpoint

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, Manifest, file_entry
from vllm_dfloat.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint of one unit, with a tokenizer and a manifest."""
    path = write_checkpoint(tmp_path / "model", {"odd77": stored_unit("edge-good", "odd77")})
    (path / "tokenizer").mkdir()
    (path / "tokenizer/vocab.txt").write_text("a\nb\n")
    names = ("config.json", "model.safetensors", "tokenizer/vocab.txt")
    files = {name: file_entry(path / name) for name in names}
    (path / MANIFEST_FILE).write_text(Manifest(files, {"odd77.weight": (7, 11)}).as_text())
    return path


def test_files_as_the_manifest_says_are_fine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert (
        out
        == f"{folder}: 1 tensor, 154 bytes decode without an error; as the manifest says: 3 files\n"
    )
    assert err == ""


def flip_a_mantissa(folder: Path) -> None:
    """Flip a bit that no code depends on: the unit still decodes, to other weights."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    at = bytes(data).rindex(stored_unit("edge-good", "odd77")["sign_mantissa"].tobytes())
    data[at] ^= 1
    file.write_bytes(data)


def pipe(folder: Path) -> None:
    (folder / "tokenizer/vocab.txt").unlink()
    os.mkfifo(folder / "tokenizer/vocab.txt")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda f: (f / "tokenizer/vocab.txt").unlink(), "tokenizer/vocab.txt: cannot be read: No such file"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer/vocab.txt: cannot be read: No such file"),
        (lambda f: (f / "tokenizer/vocab.txt").write_text("a\n"), "tokenizer/vocab.txt: 2 bytes; "),
        (lambda f: (f / "tokenizer/vocab.txt").write_text("a\nc\n"), "tokenizer/vocab.txt: SHA-256 "),
        (flip_a_mantissa, "model.safetensors: SHA-256 "),
        (pipe, "tokenizer/vocab.txt: is a directory, pipe or device"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_the_manifest_says_is_one_line_and_exits_1(
    damage: Callable[[Path], object],
    line: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert out.startswith(line)
    assert out.splitlines()[1].endswith("decode, but not as the manifest says: 1 file")
    assert err == ""


def test_every_file_that_differs_has_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_mantissa(folder)
    (folder / "tokenizer/vocab.txt").unlink()
    assert main(["verify", str(folder), "--quiet"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "model.safetensors",
        "tokenizer/vocab.txt",
    ]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 7, "files": {}, "tensors": {}}']
)
def test_a_damaged_manifest_exits_2(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    assert main(["verify", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"vllm-dfloat: {folder / MANIFEST_FILE}: ")


def test_a_path_out_of_the_folder_is_refused_and_not_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"]["../secret"] = {"bytes": 3, "sha256": "0" * 64}
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    assert main(["verify", str(folder)]) == 2
    assert "names the file '../secret', which is not below" in capsys.readouterr().err


def test_without_a_manifest_verify_says_that_it_only_decoded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST_FILE).unlink()
    assert main(["verify", str(folder)]) == 0
    assert "(no manifest; give --against to compare)" in capsys.readouterr().out


def test_a_shape_that_the_weights_do_not_have_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: all fine, and decompress of the same folder refused it.
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["tensors"]["odd77.weight"] = [7, 12]
    (folder / MANIFEST_FILE).write_text(json.dumps(content))
    assert main(["verify", str(folder)]) == 2
    assert "odd77 has 77 weights in the file; the model has [7, 12]" in capsys.readouterr().err
