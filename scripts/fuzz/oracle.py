"""Read a damaged checkpoint as simply as possible: json, slices of bytes, and the slow reference decoder.

Shares nothing with the reader under test but dfloat11/reference.py. It may raise anything on broken input: it is used
only if the reader has refused nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dfloat.dfloat11 import reference
from vllm_dfloat.dfloat11.unit import Unit

FIELDS = (
    "encoded_exponent",
    "sign_mantissa",
    "luts",
    "output_positions",
    "gaps",
    "split_positions",
)
Tensors = dict[str, tuple[str, bytes]]  # name -> dtype, bytes


class StoredTwice(ValueError):
    """A weight is stored twice, so that the bytes are ambiguous."""


def expected_tensors(folder: Path, modules: Collection[str] = ()) -> Tensors:
    """Return every tensor by its original name; the reference decodes those of units.

    Args:
        modules: names of the original's modules. A unit with the name of one of them that holds one weight is the
            weight of this module, whatever its pattern lists.
    """
    settings = _json(folder / "config.json").get("dfloat11_config")
    for file in _plain_files(folder) if settings is None else ():
        settings = settings or _settings_in_header(file)
    if settings is None:
        return {name: (dtype, data) for name, (dtype, _, data) in _plain_model(folder).items()}
    stored = {}
    for file in _visible(folder, "*.safetensors"):
        stored.update(_read(file))
    patterns = settings["pattern_dict"]
    shapes = listed_shapes(folder)
    units = {name.rpartition(".")[0] for name in stored if name.rpartition(".")[2] in FIELDS} - {""}
    found: Tensors = {}
    for unit in units:
        parts = tuple(stored.pop(f"{unit}.{field}")[2] for field in FIELDS)
        bits = _decode(*parts)
        splits = np.frombuffer(parts[5], "<i8").tolist()
        members = next(list_ for key, list_ in patterns.items() if re.fullmatch(key, unit))
        is_itself = not members or (not splits and (len(members) > 1 or unit in modules))
        paths = [unit] if is_itself else [f"{unit}.{member}" for member in members]
        for path, part in zip(paths, np.split(bits, splits), strict=True):
            name = path if path in shapes and not path.endswith(".weight") else f"{path}.weight"
            if name in found:
                raise StoredTwice(f"{name} comes from two units")
            found[name] = ("BF16", part.tobytes())
    if found.keys() & stored.keys():
        raise StoredTwice(f"stored twice: {found.keys() & stored.keys()}")
    return found | {name: (dtype, data) for name, (dtype, _, data) in stored.items()}


def original_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return name -> dtype, shape, bytes of a plain model."""
    return _plain_model(folder)


def listed_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of compressed tensors that the manifest says, none without one."""
    shapes: dict[str, list[int]] = _json(folder / "dfloat11_manifest.json").get("tensors", {})
    return shapes


def manifest_holds(folder: Path) -> bool:
    """Return whether every file matches the manifest, and no other weight file exists; True without a manifest."""
    content = _json(folder / "dfloat11_manifest.json")
    if not content:
        return True
    for name, entry in content["files"].items():
        file = folder / name
        if not os.path.isfile(file) or file.stat().st_size != entry["bytes"]:
            return False
        if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            return False
    return all(file.name in content["files"] for file in _visible(folder, "*.safetensors"))


def _visible(folder: Path, pattern: str) -> list[Path]:
    return [file for file in folder.glob(pattern) if file.name[0] != "."]


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
    return content


def _settings_in_header(file: Path) -> Any:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = (header.get("__metadata__") or {}).get("dfloat11_config")
    return json.loads(text) if isinstance(text, str) else None


def _plain_model(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for file in _plain_files(folder):
        found.update(_read(file))
    return found


def _plain_files(folder: Path) -> list[Path]:
    indices = {file.name: file for file in _visible(folder, "*.safetensors.index.json")}
    files = _visible(folder, "*.safetensors")
    usual = [file for file in files if not file.name.startswith("consolidated")]
    left = [name for name in indices if not (usual and name.startswith("consolidated"))]
    standard = "model.safetensors.index.json"
    chosen = standard if standard in indices else next(iter(left), "")
    if not chosen:
        return usual or files
    return [folder / name for name in set(_json(indices[chosen])["weight_map"].values())]


def _read(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), content[start:][begin:end])
    return found


@lru_cache(maxsize=2000)
def _decode(
    stream: bytes, sign_mantissa: bytes, luts: bytes, positions: bytes, gaps: bytes, splits: bytes
) -> np.ndarray:
    starts = np.frombuffer(positions, "<u4").astype(np.int64)
    if len(starts) == -(-len(stream) // 4096):
        starts = np.append(starts, len(sign_mantissa))
    u8 = [np.frombuffer(part, np.uint8) for part in (stream, sign_mantissa, gaps, luts)]
    table = u8[3].reshape(-1, 256)
    nothing = np.zeros(0, np.int64)
    unit = Unit("u", "u", u8[0], u8[1], u8[2], starts, nothing, table, nothing.astype(np.int32))
    return reference.decode(unit)
