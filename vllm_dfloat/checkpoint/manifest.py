"""dfloat11_manifest.json: the contents of a checkpoint that was made here.

Beside size and SHA-256 of every file it lists what the official format does not store: names and shapes of compressed
tensors. With them a reader needs no model class, and experts that are one 3-D tensor have a name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.checkpoint.listing import blobs_of, weight_files
from vllm_dfloat.checkpoint.side_weights import is_weights
from vllm_dfloat.errors import FormatError, one_line, shown
from vllm_dfloat.storage.json_file import MAX_LIST_BYTES, read_object, regular_size
from vllm_dfloat.storage.progress import Advance, ignore
from vllm_dfloat.storage.safetensors_read import header_sha256

MANIFEST_FILE = "dfloat11_manifest.json"
VERSION = 1
_MAX_DIMS = 8
_PIECE_BYTES = 1 << 20
MAX_NAMED = 3  # files that a message names
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.

    Attributes:
        files: file name -> {"bytes", "sha256"}, all but the manifest itself.
        shapes: name of each compressed tensor -> its shape.
        headers: name of each weight file -> SHA-256 of its header, which is read anyway when a checkpoint is opened.
            Empty in manifests of earlier versions.
        units: SHA-256 of `dfloat11_config`, which alone says in which order a unit has its weights (`digest_of`); ""
            in manifests of earlier versions.
    """

    files: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    headers: Mapping[str, str] = field(default_factory=dict)
    units: str = ""

    @property
    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return module path -> shape; parameters that are no module's `weight` go by their own name."""
        return {name.removesuffix(".weight"): shape for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> frozenset[str]:
        """Return the compressed tensors that are no module's `weight`."""
        return frozenset(name for name in self.shapes if not name.endswith(".weight"))

    def as_text(self) -> str:
        content: dict[str, Any] = {
            "version": VERSION,
            "files": {name: dict(self.files[name]) for name in sorted(self.files)},
            "headers": {name: self.headers[name] for name in sorted(self.headers)},
            "tensors": {name: list(self.shapes[name]) for name in sorted(self.shapes)},
        }
        if self.units:
            content["units"] = self.units
        return json.dumps(content, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint, None if it has none.

    Raises:
        FormatError: it is damaged or of a version not known here.
    """
    file = folder / MANIFEST_FILE
    content = read_object(file, MAX_LIST_BYTES)
    if content is None:
        return None
    version, files, tensors = (content.get(key) for key in ("version", "files", "tensors"))
    if version != VERSION:
        _refuse(file, f"is of version {shown(version)}, {VERSION} is expected")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        _refuse(file, "has no objects `files` and `tensors`")
    for name, entry in files.items():
        _check_file(file, name, entry)
    headers = content.get("headers", {})
    if not isinstance(headers, dict) or not all(map(_is_digest, headers.values())):
        _refuse(file, "has `headers` that are no object of SHA-256 digests")
    units = content.get("units", "")
    if units and not _is_digest(units):
        _refuse(file, f"says that the SHA-256 of {CONFIG_KEY} is {shown(units)}")
    shapes = {name: _shape(file, name, shape) for name, shape in tensors.items()}
    return Manifest(files, shapes, headers, units)


def digest_of(settings: Any) -> str:
    """Return the SHA-256 of a `dfloat11_config`, whatever spaces and order of keys its file has."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def refuse_other_units(folder: Path, manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Refuse a config.json whose `dfloat11_config` was changed: another order of weights of one size shows nowhere.

    Raises:
        FormatError: it was.
    """
    if manifest.units and digest_of(config.get(CONFIG_KEY)) != manifest.units:
        raise FormatError(
            f"{folder}: {CONFIG_KEY} in config.json is not the one that {MANIFEST_FILE} was made with; expected no "
            "change, since it says which weights a unit has, in which order. Restore it, or make the checkpoint again."
        )


def _check_file(manifest: Path, name: str, entry: Any) -> None:
    parts = name.split("/")
    # The first part of an absolute path is "".
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        _refuse(
            manifest, f"names the file {shown(name)}, which is not below the checkpoint's folder"
        )
    good = isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}
    if not good or type(entry["bytes"]) is not int or entry["bytes"] < 0:
        _refuse(manifest, f"has no size and SHA-256 for the file {shown(name)}")
    if not _is_digest(entry["sha256"]):
        _refuse(manifest, f"says that the SHA-256 of {shown(name)} is {shown(entry['sha256'])}")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _shape(manifest: Path, name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        type(size) is int and 0 < size < 1 << 40 for size in value
    ):
        _refuse(manifest, f"says that {shown(name)} has the shape {shown(value)}")
    if len(value) > _MAX_DIMS:
        _refuse(
            manifest,
            f"says that {shown(name)} has {len(value)} dimensions, at most {_MAX_DIMS} are expected",
        )
    return tuple(value)


def _refuse(manifest: Path, what: str) -> NoReturn:
    raise FormatError(f"{manifest}: {what}. Remove it to read the checkpoint without it.")


def refuse_other_files(folder: Path, manifest: Manifest) -> None:
    """Compare the weight files of a checkpoint with its manifest, as far as that can be done at once.

    Names, sizes and headers show that a file was removed, renamed, added, cut or replaced by one with other tensors.
    They do not show other values; for these `file_differences` reads everything. Weight files of other formats are
    compared if they are listed; others may be there. In a snapshot of a Hugging Face cache they may be missing.

    Raises:
        FormatError: a weight file is missing, too many, or another one.
    """
    listed = {name for name in manifest.files if is_weights(name)}
    files = {file.name: file for file in weight_files(folder)}
    added = sorted(files.keys() - listed)
    files |= {name: folder / name for name in listed if (folder / name).exists()}
    missing = listed - files.keys()
    if blobs_of(folder):  # vLLM fetches these when it reads them
        missing = {name for name in missing if name.endswith(".safetensors")}
    found = [f"{one_line(name)} is missing" for name in sorted(missing)]
    found += [f"{one_line(name)} is not listed" for name in added]
    for name in sorted(listed & files.keys()):
        size, expected = regular_size(files[name]), manifest.files[name]["bytes"]
        if size != expected:
            found.append(f"{one_line(name)} has {size} bytes instead of {expected}")
        elif name in manifest.headers and header_sha256(files[name]) != manifest.headers[name]:
            found.append(f"{one_line(name)} holds tensors of other names, dtypes or shapes")
    if found:
        more = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        only_more = len(found) == len(added)
        advice = "Move" if only_more else "Fetch the checkpoint again, or make it again, and move"
        raise FormatError(
            f"{folder}: its weight files are not the {len(listed)} that {MANIFEST_FILE} lists: "
            f"{', '.join(found[:MAX_NAMED])}{more}. {advice} what is not listed out of the folder."
        )


def refuse_missing_weights(folder: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Refuse a checkpoint without a compressed tensor that its manifest lists.

    Args:
        names: of all tensors in the checkpoint.

    Raises:
        FormatError: one is missing.
    """
    missing = sorted(set(manifest.shapes) - set(names))
    if missing:
        raise FormatError(
            f"{folder}: {len(missing)} of {len(manifest.shapes)} compressed tensors that {MANIFEST_FILE} lists are "
            f"missing, such as {one_line(missing[0])}. Fetch the checkpoint again, or make it again."
        )


def file_differences(folder: Path, manifest: Manifest, advance: Advance = ignore) -> list[str]:
    """Return a sentence for every file that is not as the manifest says.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        advance: called with the bytes that were read.
    """
    found = []
    for name, expected in manifest.files.items():
        what = difference(folder / name, expected, advance)
        if what:
            found.append(f"{one_line(name)}: {what}")
    return found


def difference(file: Path, expected: Mapping[str, Any], advance: Advance = ignore) -> str:
    """Read a file; return how it differs from its entry in a manifest, "" if it does not."""
    try:
        size = regular_size(file)
        if size != expected["bytes"]:
            return f"{size} bytes; {MANIFEST_FILE} says {expected['bytes']}"
        digest = file_entry(file, advance)["sha256"]
    except FormatError as error:  # it is missing, or a pipe or the like
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
