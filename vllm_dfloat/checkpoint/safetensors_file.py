"""Read safetensors files lazily: headers are checked in full, tensors are mapped one at a time.

The safetensors library copies every tensor it hands to NumPy and has no NumPy dtype for BF16. A
DFloat11 unit is one tensor of up to a gigabyte, so this reader maps the bytes instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from vllm_dfloat.checkpoint.file_identity import FileIdentity, require_same
from vllm_dfloat.checkpoint.json_file import read_text, regular_size
from vllm_dfloat.checkpoint.lfs import refuse_pointer
from vllm_dfloat.errors import FormatError, UnsupportedError, shown

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
MAX_NAME = 512  # characters; real names have about 100
_MAX_DIMS = 16

# dtype name -> the NumPy dtype that holds its bits (BF16 and FP8 as integers of the same width)
BITS_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; nothing is read before `bits` is called.

    Attributes:
        file: the file that holds it.
        name, dtype, shape: as the header has them.
        begin: its first byte, counted from the start of the file.
        num_bytes: its size in bytes.
        identity: of the file when its header was read; None where nobody looked.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int
    identity: FileIdentity | None = None

    @property
    def where(self) -> str:
        """Return "file: tensor" for messages."""
        return f"{self.file.name}: {self.name}"

    def bits(self) -> npt.NDArray[Any]:
        """Return the tensor's bits, mapped privately from the file: a write never reaches it.

        Raises:
            ChangedError: the file is not what it was when its header was read.
            FormatError: it cannot be read.
        """
        dtype = np.dtype(BITS_DTYPES[self.dtype])
        if self.num_bytes == 0:
            return np.empty(self.shape, dtype)
        try:
            plain = self._map()
        except (OSError, ValueError) as error:
            raise FormatError(
                f"{self.where}: cannot read {self.num_bytes} bytes at byte {self.begin}: {error}. "
                "Fetch the file again."
            ) from error
        if plain.ctypes.data % dtype.itemsize:
            plain = plain.copy()  # an unusual header length left the data unaligned
        return plain.view(dtype).reshape(self.shape)

    def read(self) -> npt.NDArray[Any]:
        """Return the tensor's bits in memory of their own, for small ones: no later change of the file reaches them.

        Raises:
            ChangedError, FormatError: as `bits`.
        """
        buffer = np.empty(self.num_bytes, np.uint8)
        try:
            with self.open() as stream:
                fill(stream.fileno(), buffer, self.begin)
                require_same(self.file, self.identity, stream.fileno())
        except OSError as error:
            raise FormatError(
                f"{self.where}: cannot be read: {error}. Fetch the file again."
            ) from error
        return buffer.view(BITS_DTYPES[self.dtype]).reshape(self.shape)

    def open(self) -> BinaryIO:
        """Return the file, open, unbuffered, and the same as when its header was read.

        Raises:
            ChangedError: it is not.
            OSError: it cannot be opened.
        """
        try:
            stream = self.file.open("rb", buffering=0)
        except FileNotFoundError:
            require_same(self.file, self.identity)
            raise
        try:
            require_same(self.file, self.identity, stream.fileno())
        except BaseException:
            stream.close()
            raise
        return cast(BinaryIO, stream)

    def _map(self) -> npt.NDArray[np.uint8]:
        """Return the bytes as np.memmap would; that one resolves the path first, which takes longer than the rest."""
        skipped = self.begin % mmap.ALLOCATIONGRANULARITY
        with self.open() as stream:
            pages = mmap.mmap(
                stream.fileno(),
                skipped + self.num_bytes,
                access=mmap.ACCESS_COPY,
                offset=self.begin - skipped,
            )
        return np.frombuffer(pages, np.uint8, self.num_bytes, skipped)


def files_of(tensors: Iterable[StoredTensor]) -> dict[Path, FileIdentity | None]:
    """Return the files that hold these tensors, each with its identity when its header was read."""
    return {tensor.file: tensor.identity for tensor in tensors}


def fill(descriptor: int, buffer: npt.NDArray[np.uint8], at: int) -> None:
    """Read bytes `at`.. of an open file until the buffer is full.

    Raises:
        OSError: the file ends before that, or cannot be read.
    """
    filled = 0
    while filled < buffer.size:
        count = os.preadv(descriptor, [buffer[filled:].data], at + filled)
        if not count:
            raise OSError(f"the file ends at byte {at + filled}")
        filled += count


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order of their data.

    Raises:
        FormatError: the header is not valid or does not fit the file's size.
        UnsupportedError: a tensor has a dtype that this package does not know.
    """
    text, identity = _header_text(file)
    header = _parse(file, text)
    header.pop(_METADATA, None)
    start = _LENGTH_BYTES + len(text)
    tensors = [_tensor(file, identity, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.num_bytes))
    _check_layout(file, tensors, start, identity.size)
    return {tensor.name: tensor for tensor in tensors}


def read_names(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Return what a header calls tensors, whatever it says about them, and its metadata.

    Raises:
        FormatError: it is no header.
    """
    header = _parse(file, _header_text(file)[0])
    metadata = header.pop(_METADATA, None)
    return list(header), metadata if isinstance(metadata, dict) else {}


def header_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's header: of the names, dtypes, shapes and places of its tensors.

    Raises:
        FormatError: it has none.
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
                    f"{file.name}: its first 8 bytes announce a header of {length} bytes, but the "
                    f"file has {size} bytes. It is truncated or not safetensors; fetch it again."
                )
            text = read_text(stream, length, file.name)
            require_same(file, identity, stream.fileno())
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror}.") from error
    return text, identity


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("it names a tensor twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name}: the header is not valid JSON: {error}.") from error
    if not isinstance(header, dict):
        raise FormatError(f"{file.name}: the header is a {type(header).__name__}, not an object.")
    return header


def _tensor(file: Path, identity: FileIdentity, name: str, entry: Any, start: int) -> StoredTensor:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise UnsupportedError(
            f"{file.name}: a tensor is named {shown(name)}, {len(name)} characters; "
            f"1 to {MAX_NAME} printable ones are expected."
        )
    where = f"{file.name}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: the header entry must hold dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_DTYPES:
        raise UnsupportedError(
            f"{where}: dtype {shown(dtype)}; known are {', '.join(BITS_DTYPES)}."
        )
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{where}: shape and data_offsets must be lists of sizes.")
    begin, end = offsets
    need = math.prod(shape) * np.dtype(BITS_DTYPES[dtype]).itemsize
    if end - begin != need:
        raise FormatError(
            f"{where}: data_offsets span {end - begin} bytes; {dtype} {shape} takes {need}."
        )
    if (
        math.prod(max(1, size) for size in shape) >> 63
    ):  # NumPy cannot name even an empty array of that shape
        raise FormatError(
            f"{where}: shape {shape}; sizes whose product is below 2**63 are expected."
        )
    return StoredTensor(file, name, dtype, tuple(shape), start + begin, need, identity)


def _is_sizes(value: Any) -> bool:
    """Return whether `value` is a short list of integers that can be sizes in a file."""
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
            f"{file.name}: the header describes {at} bytes, but the file has {size}. "
            "It is truncated or was changed; fetch it again."
        )
