"""A checkpoint in memory that a mutation can change: files by name, and the tensors of safetensors files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Special:
    """An entry of a folder that is not a plain file.

    Attributes:
        kind: "link", "pipe", "folder", or "sparse": a file with a long hole at its end.
        content: target of a link, or start of a sparse file.
        size: of a sparse file, in bytes.
    """

    kind: str
    content: bytes = b""
    size: int = 0


Folder = dict[
    str, "bytes | Special"
]  # names may hold any characters, also surrogates for bytes that are not UTF-8


def read_folder(path: Path) -> Folder:
    """Return the files directly in a folder."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


def write_folder(folder: Mapping[str, bytes | Special], path: Path) -> int:
    """Empty and rewrite a folder; return the bytes of its plain files. Names that no file can have are skipped."""
    clear(path)
    total = 0
    for name, content in folder.items():
        file = path / name
        try:
            if isinstance(content, Special):
                _write_special(content, file)
            else:
                file.write_bytes(content)
                total += len(content)
        except (OSError, ValueError):  # too long, NUL, a slash, lone surrogates
            continue
    return total


def clear(path: Path) -> None:
    """Make `path` an empty folder."""
    path.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(path):  # removes links themselves, not their targets
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _write_special(special: Special, file: Path) -> None:
    if special.kind == "link":
        os.symlink(special.content, os.fsencode(file))
    elif special.kind == "pipe":
        os.mkfifo(file)
    elif special.kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(special.content)
        os.truncate(file, special.size)


@dataclass
class Stored:
    """One tensor of a safetensors file: its header entry and its bytes."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


def unpack(content: bytes) -> list[Stored]:
    """Return the tensors of an intact safetensors file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the file is not intact.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = 8 + length
    return [
        Stored(
            name,
            entry["dtype"],
            entry["shape"],
            content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def pack(
    tensors: list[Stored], change: Callable[[dict[str, Any]], Any] = lambda header: None
) -> bytes:
    """Return a safetensors file; `change` may falsify its header first."""
    header: dict[str, Any] = {}
    at = 0
    for tensor in tensors:
        end = at + len(tensor.data)
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, end],
        }
        at = end
    change(header)
    return with_header(json.dumps(header).encode(), b"".join(tensor.data for tensor in tensors))


def with_header(text: bytes, data: bytes) -> bytes:
    """Return a safetensors file with this header text."""
    return len(text).to_bytes(8, "little") + text + data


def weight_files(folder: Folder) -> list[str]:
    """Return the names of the safetensors files that are still plain files and can be parsed."""
    found = []
    for name, content in folder.items():
        if name.endswith(".safetensors") and isinstance(content, bytes):
            try:
                unpack(content)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
                continue
            found.append(name)
    return found
