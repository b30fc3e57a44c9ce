"""The writer against the safetensors library: the same file, byte for byte."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.safetensors_read import read_header
from vllm_dfloat.storage.safetensors_write import (
    TEMPORARY,
    Item,
    copy_item,
    replacing,
    write_safetensors,
)

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16]
DTYPES += [torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_file_equals_that_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {
        f"{name}.{i}": torch.randint(0, 2, shape).to(dtype)
        for i, dtype in enumerate(DTYPES)
        for name, shape in (("größe", (3, 5)), ("b", (7,)), ("none", (0, 4)), ("scalar", ()))
    }
    save_file(tensors, tmp_path / "theirs", metadata)
    items = [copy_item(tensor) for tensor in read_header(tmp_path / "theirs").values()]
    written = write_safetensors(tmp_path / "ours", items[::-1], metadata)
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert (written.num_bytes, written.sha256) == (len(ours), hashlib.sha256(ours).hexdigest())


def test_pieces_follow_each_other(tmp_path: Path) -> None:
    whole = np.arange(1000, dtype=np.uint16).reshape(10, 100)
    parts = [whole[:3], whole[3:3], whole[3:].T.copy().T]
    write_safetensors(tmp_path / "f", [Item("a", "BF16", (10, 100), lambda: parts)])
    loaded = load_file(tmp_path / "f")["a"].view(torch.uint16)
    assert torch.equal(loaded, torch.from_numpy(whole))


def test_an_item_that_gives_other_bytes_than_announced_is_an_error(tmp_path: Path) -> None:
    item = Item("a", "U8", (4,), lambda: [np.zeros(3, np.uint8)])
    with pytest.raises(FormatError, match="a: 3 bytes were made, 4 expected"):
        write_safetensors(tmp_path / "f", [item])


def test_a_failed_replacement_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as temporary:
            assert temporary.name.startswith(TEMPORARY)
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert file.read_text() == "old"
