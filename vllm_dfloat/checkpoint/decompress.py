"""Write a DFloat11 checkpoint back as BF16 safetensors with an index, bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dfloat.checkpoint.decode_unit import decode_unit
from vllm_dfloat.checkpoint.dfloat11 import Dfloat11Checkpoint, open_checkpoint
from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.safetensors_file import StoredTensor
from vllm_dfloat.checkpoint.shapes import module_shapes
from vllm_dfloat.checkpoint.source import config_text, other_files
from vllm_dfloat.checkpoint.unit import Unit, UnitEntry
from vllm_dfloat.checkpoint.weights import Member, plan
from vllm_dfloat.checkpoint.write_safetensors import Item, copy_item, replacing, write_safetensors
from vllm_dfloat.errors import FormatError

SHARD_BYTES = 5_000_000_000
INDEX_FILE = "model.safetensors.index.json"
_DECODED_AT_ONCE = 1 << 23  # weights


@dataclass(frozen=True)
class Restored:
    """How many tensors were written, and how many bytes they take."""

    tensors: int
    num_bytes: int


def decompress(
    path: Path,
    out: Path,
    force: bool = False,
    start: Callable[[int], None] = lambda num_bytes: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    shard_bytes: int = SHARD_BYTES,
) -> Restored:
    """Write the tensors of the DFloat11 checkpoint `path` into the folder `out`, with everything beside them.

    Shards are cut at `shard_bytes` and get their names when they are complete; the index comes last.

    Args:
        path: a DFloat11 checkpoint, ours or an official one.
        out: a new or empty folder.
        force: take another folder too, and replace the checkpoint in it.
        start, advance: called with the bytes to be written, in all and as they are.
        shard_bytes: the largest size of a file, unless one tensor alone takes more.

    Raises:
        FormatError: the checkpoint is damaged, or `out` cannot be used.
        UnsupportedError: the shapes of its weights cannot be found out.
    """
    checkpoint = open_checkpoint(path)
    _prepare(path, out, force)
    items = plan(checkpoint, module_shapes(path), keep_tied=True)
    checkpoint.validate()
    sizes = {item.name: _num_bytes(item) for item in items}
    total = sum(sizes.values())
    start(total)
    shards = _cut(items, sizes, shard_bytes)
    reader = _Reader(advance)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with replacing(out / name) as temporary:
            write_safetensors(temporary, [reader.item(item) for item in shard], {"format": "pt"})
        weight_map.update(dict.fromkeys((item.name for item in shard), name))
    _write_rest(checkpoint, out, total, weight_map)
    return Restored(len(items), total)


class _Reader:
    """Makes items of a checkpoint's tensors; holds one unit open at a time."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._unit: Unit | None = None

    def item(self, tensor: Member | StoredTensor) -> Item:
        if isinstance(tensor, StoredTensor):
            item = copy_item(tensor)
            pieces: Callable[[], Iterable[npt.NDArray[Any]]] = item.pieces
        else:
            item = Item(tensor.name, "BF16", tensor.shape, lambda: ())
            member = tensor
            pieces = lambda: self._decode(member)  # noqa: E731
        return Item(item.name, item.dtype, item.shape, lambda: self._counted(pieces()))

    def _decode(self, member: Member) -> Iterator[npt.NDArray[np.uint16]]:
        unit = self._open(member.entry)
        for first in range(member.start, member.stop, _DECODED_AT_ONCE):
            yield decode_unit(unit, first, min(first + _DECODED_AT_ONCE, member.stop))

    def _open(self, entry: UnitEntry) -> Unit:
        if self._unit is None or self._unit.name != entry.name:
            self._unit = entry.load()
        return self._unit

    def _counted(self, pieces: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
        for piece in pieces:
            yield piece
            self._advance(piece.nbytes)


def _num_bytes(item: Member | StoredTensor) -> int:
    return item.num_bytes if isinstance(item, StoredTensor) else 2 * math.prod(item.shape)


def _cut(
    items: Sequence[Member | StoredTensor], sizes: dict[str, int], limit: int
) -> list[list[Member | StoredTensor]]:
    """Return the items in their order, cut where a shard would exceed `limit` bytes."""
    shards: list[list[Member | StoredTensor]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + sizes[item.name] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += sizes[item.name]
    return shards


def _prepare(path: Path, out: Path, force: bool) -> None:
    here, there = path.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise FormatError(
            f"{out}: lies in {path} or around it; the source is never touched. Choose another."
        )
    if out.exists() and not out.is_dir():
        raise FormatError(f"{out}: is a file; expected a new or empty folder.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FormatError(
            f"{out}: exists and is not empty; give --force to replace the checkpoint in it, or choose a new folder."
        )
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for file in out.glob(pattern):
            file.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _write_rest(
    checkpoint: Dfloat11Checkpoint, out: Path, total: int, weight_map: dict[str, str]
) -> None:
    """Write config, index and copies of all other files."""
    for name in other_files(checkpoint.path):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(out / name) as temporary:
            shutil.copyfile(checkpoint.path / name, temporary)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    texts = {
        CONFIG_FILE: config_text(checkpoint.config, None),
        INDEX_FILE: json.dumps(index, indent=2) + "\n",
    }
    for name, text in texts.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text)
