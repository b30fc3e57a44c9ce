"""Errors of the operating system, and paths that are no files: the error names the path."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_commands import make_places, only_line
from dfloat11_helpers import stored_unit, write_checkpoint

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.cli import main
from vllm_dfloat.convert.source import bf16_tensors
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.safetensors_write import Item, replacing, write_safetensors

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4976698672\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a DFloat11 checkpoint of one unit."""
    return write_checkpoint(tmp_path / "model", {"odd77": stored_unit("edge-good", "odd77")})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST_FILE])
def test_a_git_lfs_pointer_is_called_one(name: str, folder: Path) -> None:
    # Bug caught: "announce a header of 2336344...", "not valid JSON", which do not lead the user to `git lfs pull`.
    (folder / name).write_text(POINTER)
    with pytest.raises(FormatError) as error:
        open_checkpoint(folder)
    assert str(error.value) == (
        f"{folder / name}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in {folder}, or fetch the "
        "model again."
    )


def test_an_index_that_is_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_text(POINTER)
    (tmp_path / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(FormatError, match=r"index.json: is a Git LFS pointer"):
        bf16_tensors(tmp_path)


def test_a_tokenizer_that_is_a_git_lfs_pointer_is_not_passed_on(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: after only the weights were pulled, a checkpoint that cannot be served was made without an error.
    for command, kind in (("compress", "bf16"), ("decompress", "df11")):
        source = Path(shutil.copytree(places[kind], tmp_path / kind))
        (source / "figure.png").write_text(POINTER)
        assert main([command, str(source), str(tmp_path / f"{kind}-out")]) == 0
        assert "figure.png: is not copied: it is a Git LFS pointer" in capsys.readouterr().out
        (source / "tokenizer.json").write_text(POINTER)
        assert main([command, str(source), str(tmp_path / f"{kind}-new")]) == 2
        line = only_line(capsys.readouterr().err)
        assert line.startswith(f"vllm-dfloat: {source / 'tokenizer.json'}: is a Git LFS pointer")
        assert not (tmp_path / f"{kind}-new").exists()


def _too_large(file: Path) -> None:
    item = Item("a", "U8", (1 << 20,), lambda: [np.zeros(1 << 20, np.uint8)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with replacing(file) as temporary:
            write_safetensors(temporary, [item])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _copied_too_large(file: Path) -> None:
    source = file.with_name("source")
    source.write_bytes(bytes(1 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with replacing(file) as temporary:
            shutil.copyfile(source, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _no_folder(file: Path) -> None:
    shutil.rmtree(file.parent)
    with replacing(file) as temporary:
        temporary.write_text("a")


def _a_folder_there(file: Path) -> None:
    file.mkdir()
    (file / "b").write_text("b")
    with replacing(file) as temporary:
        temporary.write_text("a")


def _full(file: Path) -> None:
    with replacing(file), open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"a")


@pytest.mark.parametrize(
    ("fail", "number"),
    [
        (_too_large, errno.EFBIG),
        (_copied_too_large, errno.EFBIG),
        (_no_folder, errno.ENOENT),
        (_a_folder_there, errno.EISDIR),
        (_full, errno.ENOSPC),
    ],
)
def test_an_error_while_a_file_is_written_names_that_file(
    fail: Callable[[Path], None], number: int, tmp_path: Path
) -> None:
    # Bugs caught: "File too large." without a path; the name of a temporary file that no longer exists.
    file = tmp_path / "out" / "model.safetensors"
    file.parent.mkdir()
    with pytest.raises(OSError) as error:  # noqa: PT011  # its number is compared
        fail(file)
    assert error.value.errno == number
    assert str(file) in (error.value.filename, error.value.filename2)
    assert ".tmp-" not in str(error.value)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(tmp_path_factory.mktemp("places"))


def test_a_name_that_is_too_long_is_one_sentence_with_the_name(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = str(tmp_path / ("x" * 300))
    for arguments in (
        ["compress", long, str(tmp_path / "new")],
        ["compress", str(places["bf16"]), long],
        ["decompress", long, str(tmp_path / "new")],
        ["decompress", str(places["df11"]), long],
        ["inspect", long],
        ["verify", long],
        ["verify", str(places["df11"]), "--against", long],
    ):
        assert main(arguments) == 2
        line = only_line(capsys.readouterr().err)
        assert line.startswith(f"vllm-dfloat: {long}")
        assert line.endswith(f": {os.strerror(errno.ENAMETOOLONG)}.")


def test_an_error_that_names_no_file_names_what_the_command_works_on(
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("vllm_dfloat.convert.compress.plan_units", fail)
    assert main(["compress", str(places["bf16"]), str(tmp_path / "new")]) == 2
    assert only_line(capsys.readouterr().err) == (
        f"vllm-dfloat: {places['bf16']}, {tmp_path / 'new'}: {os.strerror(errno.EIO)}."
    )
