"""Read the headers of safetensors files, and check them in full."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.storage.file_identity import FileIdentity, require_same
from vllm_dfloat.storage.json_file import read_text, regular_size
from vllm_dfloat.storage.lfs import refuse_pointer
from vllm_dfloat.storage.stored_tensor import BITS_DTYPES, StoredTensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
MAX_NAME = 512  # characters; real names have about 100
_MAX_DIMS = 16
_ADVICE = "It is damaged or not safetensors; fetch the file again."
_HALF_CHARACTERS = re.compile(
    "[\ud800-\udfff]"
)  # surrogates, which JSON can escape and UTF-8 cannot hold


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their data.

    Raises:
        FormatError: the header is not valid or does not fit the file's size.
        UnsupportedError: a tensor has a dtype that this package does not know.
    """
    text, identity = _header_text(file)
    header, _ = _parse(file, text)
    start = _LENGTH_BYTES + len(text)
    tensors = [_tensor(file, identity, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.num_bytes))
    _check_layout(file, tensors, start, identity.size)
    return {tensor.name: tensor for tensor in tensors}


def read_names(file: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of the tensors in a header, whatever else it says of them, and its metadata.

    Raises:
        FormatError: the file has no header.
    """
    header, metadata = _parse(file, _header_text(file)[0])
    return list(header), metadata


def header_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's header: of the names, dtypes, shapes and offsets of its tensors.

    Raises:
        FormatError: the file has no header.
    """
    return hashlib.sha256(_header_text(file)[0]).hexdigest()


def _header_text(file: Path) -> tuple[bytes, FileIdentity]:
    """Return the JSON of a file's header, and the identity of the file that it was read from."""
    regular_size(file)
    refuse_pointer(file)
    try:
        with file.open("rb") as stream:
            identity = FileIdentity.of(os.fstat(stream.fileno()))
            size = identity.size
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
                raise FormatError(
                    f"{file}: its first 8 bytes announce a header of {length} bytes, but the "
                    f"file has {size} bytes. It is truncated or not safetensors; fetch it again."
                )
            text = read_text(stream, length, file)
            require_same(file, identity, stream.fileno())
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror}.") from error
    return text, identity


def _parse(file: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of the tensors by name, and the metadata; refuse what the safetensors library refuses."""
    try:
        # As text: json would guess other encodings from bytes, and skip a byte order mark.
        header = json.loads(
            text.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: the header is not valid JSON: {error}. {_ADVICE}") from error
    if not isinstance(header, dict):
        raise FormatError(
            f"{file}: the header is a {type(header).__name__}, not an object. {_ADVICE}"
        )
    metadata = header.pop(_METADATA, None)
    if metadata is None:
        return header, {}
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise FormatError(
            f"{file}: {_METADATA} of the header is {shown(metadata)}; text by name is expected. "
            "Write the file again with the safetensors library."
        )
    return header, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a tensor twice")
    return found


def _integer(digits: str) -> int:
    if digits == "-0":
        _refuse(digits)
    return int(digits)


def _refuse(word: str) -> None:
    raise ValueError(f"it holds the number {word}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _HALF_CHARACTERS.search(value)


def _tensor(file: Path, identity: FileIdentity, name: str, entry: Any, start: int) -> StoredTensor:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise UnsupportedError(
            f"{file}: a tensor is named {shown(name)}, {len(name)} characters; "
            f"1 to {MAX_NAME} printable ones are expected."
        )
    where = f"{file}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{where}: the header entry must hold dtype, shape and data_offsets. {_ADVICE}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_DTYPES:
        raise UnsupportedError(
            f"{where}: dtype {shown(dtype)}; known are {', '.join(BITS_DTYPES)}."
        )
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: shape and data_offsets must be lists of sizes. {_ADVICE}")
    begin, end = offsets
    need = math.prod(shape) * np.dtype(BITS_DTYPES[dtype]).itemsize
    if end - begin != need:
        raise FormatError(
            f"{where}: data_offsets span {end - begin} bytes; {dtype} {shape} takes {need}. {_ADVICE}"
        )
    # NumPy has not even an empty array of such a shape.
    if math.prod(max(1, size) for size in shape) >> 63:
        raise FormatError(
            f"{where}: shape {shape}; sizes whose product is below 2**63 are expected. {_ADVICE}"
        )
    return StoredTensor(file, name, dtype, tuple(shape), start + begin, need, identity)


def _is_sizes(value: Any) -> bool:
    """Return whether `value` is a short list of integers from 0 to 2**63 - 1."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMS
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _check_layout(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Refuse holes, overlaps and data that ends anywhere but at the end of the file."""
    at = start
    for tensor in tensors:
        if tensor.begin != at:
            raise FormatError(
                f"{tensor.where}: starts at byte {tensor.begin}; the tensor before it ends at "
                f"byte {at}. safetensors has neither holes nor overlaps; fetch the file again."
            )
        at += tensor.num_bytes
    if at != size:
        raise FormatError(
            f"{file}: the header describes {at} bytes, but the file has {size}. "
            "It is truncated or was changed; fetch it again."
        )
