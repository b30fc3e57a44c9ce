"""One tensor of a safetensors file, which is read only when it is asked for.

The safetensors library copies every tensor that it gives to NumPy, and has no NumPy dtype for BF16. The codes of a
DFloat11 unit are one tensor of up to a gigabyte, so bytes are mapped here, or read in pieces.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vllm_dfloat.codec.arrays import Bits, U8Array
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.file_identity import FileIdentity, open_same, require_same

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
        identity: of the file when its header was read; None if it was not looked at.
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
        """Return "folder/file: tensor" for messages, the folder as the user gave it."""
        return f"{self.file}: {self.name}"

    def bits(self) -> Bits:
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

    def read(self) -> Bits:
        """Return a copy of the tensor's bits in memory, for small tensors: no later change of the file reaches it.

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
        """Open the file, unbuffered, if it is the same as when its header was read.

        Raises:
            ChangedError: it is not the same.
            OSError: it cannot be opened.
        """
        return open_same(self.file, self.identity)

    def _map(self) -> U8Array:
        """Return the bytes as np.memmap would, which would also resolve the path: that takes longer than the rest."""
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


def fill(descriptor: int, buffer: U8Array, at: int) -> None:
    """Fill the buffer with the bytes of an open file from byte `at` on.

    Raises:
        OSError: the file ends before that, or cannot be read.
    """
    filled = 0
    while filled < buffer.size:
        count = os.preadv(descriptor, [buffer[filled:].data], at + filled)
        if not count:
            raise OSError(f"the file ends at byte {at + filled}")
        filled += count
