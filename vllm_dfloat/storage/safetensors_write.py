"""Write a safetensors file piece by piece, with the tensors in the order of the safetensors library.

The library needs every tensor in memory. Here a tensor is an iterable of pieces, and the SHA-256 is made meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vllm_dfloat.codec.arrays import Bits
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.file_identity import AGAIN
from vllm_dfloat.storage.pieces import read_pieces
from vllm_dfloat.storage.stored_tensor import BITS_DTYPES, StoredTensor

TEMPORARY = ".tmp-"  # prefix of files that are being written
_PIECE_BYTES = 1 << 20  # still in the cache when it is written after being hashed

Pieces = Callable[[], Iterable[Bits]]


@dataclass(frozen=True)
class Item:
    """A tensor to be written.

    Attributes:
        name, dtype, shape: for the header; dtype is a safetensors name such as "BF16".
        pieces: called once; gives its bits in order as arrays of any size. A piece may be overwritten by the next one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Pieces

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(BITS_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class Written:
    """A file that was written: its size in bytes and its SHA-256."""

    num_bytes: int
    sha256: str


def copy_item(
    tensor: StoredTensor, advance: Callable[[int], None] = lambda num_bytes: None
) -> Item:
    """Return an item that copies a stored tensor; `advance` is called with the bytes that were written."""

    def pieces() -> Iterator[Bits]:
        for piece in read_pieces(tensor, _PIECE_BYTES):
            yield piece
            advance(piece.nbytes)

    return Item(tensor.name, tensor.dtype, tensor.shape, pieces)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`. After a `with` block without errors it is synced and renamed to `file`.

    Raises:
        OSError: from the block or from this function. It names `file`, where it named the temporary path or nothing.
    """
    # One name per process: a worker of a killed run may live on for a moment while the next run works.
    temporary = file.with_name(f"{TEMPORARY}{os.getpid()}-{file.name}")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(file)
        if error.filename2 is not None:
            error.filename2 = str(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(
    file: Path, items: Sequence[Item], metadata: Mapping[str, str] | None = None
) -> Written:
    """Write `items` to `file`, which is overwritten. Tensors are put in the order of the safetensors library.

    Raises:
        OSError: the disk is full, or the like.
        FormatError: an item gave more or fewer bytes than its shape needs: its source has changed.
    """
    ordered = sorted(items, key=lambda item: (-_DTYPE_ORDER.index(item.dtype), item.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for item in ordered:
        end = at + item.num_bytes
        header[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    total = 0
    with file.open("wb") as stream:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            total += stream.write(part)
        for item in ordered:
            written = _write_item(stream, digest, item)
            if written != item.num_bytes:
                raise FormatError(
                    f"{item.name}: {written} bytes were made, {item.num_bytes} expected: what it is made from was "
                    f"changed meanwhile. {AGAIN}"
                )
            total += written
    return Written(total, digest.hexdigest())


def _write_item(stream: BinaryIO, digest: Any, item: Item) -> int:
    written = 0
    for piece in item.pieces():
        flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        for first in range(0, flat.size, _PIECE_BYTES):
            part = flat[first : first + _PIECE_BYTES].data
            digest.update(part)
            written += stream.write(part)
    return written


# The library's enumeration of dtypes; it writes tensors of later dtypes first.
_DTYPE_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64",
    "I64", "U64",
)  # fmt: skip
