"""dfloat11_manifest.json: what a checkpoint made here consists of.

Beside size and SHA-256 of every file it keeps what the official format does not store: the names and shapes of the
compressed tensors. So a reader needs no model class to restore them, and experts stored as one 3-D tensor have a name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.errors import FormatError

MANIFEST_FILE = "dfloat11_manifest.json"
VERSION = 1
_MAX_BYTES = 256 << 20


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
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"has more than {_MAX_BYTES} bytes")
        content = json.loads(file.read_bytes())
        if content["version"] != VERSION:
            raise ValueError(f"is of version {content['version']!r}, {VERSION} is expected")
        shapes = {str(name): _shape(shape) for name, shape in content["tensors"].items()}
        files = {str(name): dict(entry) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{MANIFEST_FILE}: cannot be used: {error}. Remove it to read the checkpoint without it."
        ) from error
    return Manifest(files, shapes)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        type(size) is int and 0 < size < 1 << 40 for size in value
    ):
        raise ValueError(f"{str(value)[:40]} is no shape")
    return tuple(value)


def file_entry(file: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file as a manifest has them."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
