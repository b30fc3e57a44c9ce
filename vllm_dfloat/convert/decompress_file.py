"""Write one shard of BF16 tensors from a DFloat11 checkpoint, decoded in bounded pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_dfloat.checkpoint.members import Member
from vllm_dfloat.codec.arrays import Bits, U16Array
from vllm_dfloat.convert.conversion import FileResult
from vllm_dfloat.dfloat11.decode import decode_range
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.dfloat11.unit_entry import UnitEntry
from vllm_dfloat.storage.file_identity import unchanged
from vllm_dfloat.storage.pieces import piece_weights
from vllm_dfloat.storage.progress import Advance
from vllm_dfloat.storage.safetensors_write import Item, copy_item, replacing, write_safetensors
from vllm_dfloat.storage.stored_tensor import StoredTensor, files_of


@dataclass(frozen=True)
class Shard:
    """A file to be written, and the tensors that go into it."""

    file: str
    items: tuple[Member | StoredTensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(item) for item in self.items)

    @property
    def stored(self) -> Iterator[StoredTensor]:
        """Yield the tensors of the checkpoint that the items are made from."""
        for item in self.items:
            yield from [item] if isinstance(item, StoredTensor) else item.entry.fields.values()


def num_bytes(item: Member | StoredTensor) -> int:
    """Return the bytes of a tensor in BF16, or of a plain one as it is."""
    return item.num_bytes if isinstance(item, StoredTensor) else 2 * math.prod(item.shape)


def decompress_file(shard: Shard, folder: Path, advance: Advance) -> FileResult:
    """Write `shard` into `folder` and return what was written.

    Args:
        shard: what to write.
        folder: an existing folder.
        advance: called with the bytes that were written.

    Raises:
        ChangedError: a file of the checkpoint is not what it was when it was opened.
        FormatError: a unit is damaged.
        OSError: the disk is full, or the like.
    """
    reader = _Reader(advance)
    with replacing(folder / shard.file) as temporary, unchanged(files_of(shard.stored)):
        items = [reader.item(item) for item in shard.items]
        written = write_safetensors(temporary, items, {"format": "pt"})
    return FileResult(shard.file, written.num_bytes, written.sha256)


class _Reader:
    """Makes items of a checkpoint's tensors; keeps the tables of one unit at a time."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._unit: Unit | None = None

    def item(self, tensor: Member | StoredTensor) -> Item:
        if isinstance(tensor, StoredTensor):
            return copy_item(tensor, self._advance)
        pieces: Callable[[], Iterable[Bits]] = lambda: self._decode(tensor)  # noqa: E731
        return Item(tensor.name, "BF16", tensor.shape, pieces)

    def _decode(self, member: Member) -> Iterator[U16Array]:
        step = piece_weights()
        for first in range(member.start, member.stop, step):
            stop = min(first + step, member.stop)
            piece = decode_range(self._open(member.entry), first, stop)
            yield piece
            self._advance(piece.nbytes)

    def _open(self, entry: UnitEntry) -> Unit:
        if self._unit is None or self._unit.name != entry.name:
            self._unit = entry.open()
        return self._unit
