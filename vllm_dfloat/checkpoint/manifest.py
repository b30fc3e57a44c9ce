"""dfloat11_manifest.json: what a checkpoint made here consists of.

Beside size and SHA-256 of every file it keeps what the official format does not store: the names and shapes of the
compressed tensors. So a reader needs no model class to restore them, and experts stored as one 3-D tensor have a name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.json_file import read_object, regular_size
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.progress import Advance, ignore
from vllm_dfloat.errors import FormatError, one_line, shown

MANIFEST_FILE = "dfloat11_manifest.json"
VERSION = 1
_MAX_BYTES = 256 << 20
_MAX_DIMS = 8
_PIECE_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.

    Attributes:
        files: file name -> {"bytes", "sha256"}, all but the manifest itself.
        shapes: name of each compressed tensor -> its shape.
    """

    files: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return module path -> shape; parameters that are no module's `weight` go by their own name."""
        return {name.removesuffix(".weight"): shape for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> frozenset[str]:
        """Return the compressed tensors that are no module's `weight`."""
        return frozenset(name for name in self.shapes if not name.endswith(".weight"))

    def as_text(self) -> str:
        content = {
            "version": VERSION,
            "files": {name: dict(self.files[name]) for name in sorted(self.files)},
            "tensors": {name: list(self.shapes[name]) for name in sorted(self.shapes)},
        }
        return json.dumps(content, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint, None if it has none.

    Raises:
        FormatError: it is damaged or of a version not known here.
    """
    content = read_object(folder / MANIFEST_FILE, _MAX_BYTES)
    if content is None:
        return None
    version, files, tensors = (content.get(key) for key in ("version", "files", "tensors"))
    if version != VERSION:
        _refuse(f"is of version {shown(version)}, {VERSION} is expected")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        _refuse("has no objects `files` and `tensors`")
    for name, entry in files.items():
        _check_file(name, entry)
    return Manifest(files, {name: _shape(name, shape) for name, shape in tensors.items()})


def _check_file(name: str, entry: Any) -> None:
    parts = name.split("/")
    if "\0" in name or any(
        part in ("", ".", "..") for part in parts
    ):  # an absolute path begins with ""
        _refuse(f"names the file {shown(name)}, which is not below the checkpoint's folder")
    good = isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}
    if not good or type(entry["bytes"]) is not int or entry["bytes"] < 0:
        _refuse(f"has no size and SHA-256 for the file {shown(name)}")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        _refuse(f"says that the SHA-256 of {shown(name)} is {shown(entry['sha256'])}")


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        type(size) is int and 0 < size < 1 << 40 for size in value
    ):
        _refuse(f"says that {shown(name)} has the shape {shown(value)}")
    if len(value) > _MAX_DIMS:
        _refuse(
            f"says that {shown(name)} has {len(value)} dimensions, at most {_MAX_DIMS} are expected"
        )
    return tuple(value)


def _refuse(what: str) -> NoReturn:
    raise FormatError(f"{MANIFEST_FILE}: {what}. Remove it to read the checkpoint without it.")


def file_differences(folder: Path, manifest: Manifest, advance: Advance = ignore) -> list[str]:
    """Return a sentence for every file that is not as the manifest says, and for weight files that it does not list.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        advance: called with the bytes that were read.
    """
    found = []
    for name, expected in manifest.files.items():
        difference = _difference(folder / name, expected, advance)
        if difference:
            found.append(f"{one_line(name)}: {difference}")
    extra = sorted({file.name for file in weight_files(folder)} - manifest.files.keys())
    return found + [f"{one_line(name)}: {MANIFEST_FILE} does not list it" for name in extra]


def _difference(file: Path, expected: Mapping[str, Any], advance: Advance) -> str:
    try:
        size = regular_size(file)
        if size != expected["bytes"]:
            return f"{size} bytes; {MANIFEST_FILE} says {expected['bytes']}"
        digest = file_entry(file, advance)["sha256"]
    except FormatError as error:  # missing, or nothing that can be read to its end
        reason = str(error).removeprefix(one_line(f"{file}: ")).rstrip(".")
        return f"{reason}; {MANIFEST_FILE} lists it"
    if digest != expected["sha256"]:
        return f"SHA-256 {digest}; {MANIFEST_FILE} says {expected['sha256']}"
    return ""


def file_entry(file: Path, advance: Advance = ignore) -> dict[str, Any]:
    """Return size and SHA-256 of a file as a manifest has them; `advance` is called with the bytes that were read."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
            advance(len(piece))
    return {"bytes": size, "sha256": digest.hexdigest()}
