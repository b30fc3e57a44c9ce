"""Restore the BF16 model of a DFloat11 checkpoint, bit for bit: safetensors shards with an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.listing import INDEX_FILE, weight_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.members import Member, plan, shapes_of
from vllm_dfloat.checkpoint.model_class import refuse_missing_parameters
from vllm_dfloat.checkpoint.reader import Dfloat11Checkpoint, open_checkpoint
from vllm_dfloat.checkpoint.shapes import Shapes, original_shapes, refuse_other_shapes
from vllm_dfloat.convert.conversion import Conversion, FileResult, convert
from vllm_dfloat.convert.cores import WORKER_BYTES, run_on_cores
from vllm_dfloat.convert.decompress_file import Shard, decompress_file, num_bytes
from vllm_dfloat.convert.listed_files import others, refuse_other_weights, weight_bytes
from vllm_dfloat.convert.resume import DECOMPRESSION, check_place
from vllm_dfloat.convert.source import config_text, identity_of
from vllm_dfloat.convert.source_files import SourceFiles
from vllm_dfloat.convert.work import Work
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.storage.folder_lock import FolderLock
from vllm_dfloat.storage.progress import Advance, ignore
from vllm_dfloat.storage.stored_tensor import StoredTensor

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Restored:
    """What a decompression did.

    Attributes:
        tensors, num_bytes: number and size of the tensors that were written.
        left_out: file beside the weights -> why it was not copied.
        not_sought: why it could not be checked whether tensors are missing, "" if it was.
        was_finished: an earlier run had done everything.
        not_as_listed: files beside the weights that differ from the checkpoint's manifest.
    """

    tensors: int
    num_bytes: int
    left_out: Mapping[str, str]
    not_sought: str
    was_finished: bool = False
    not_as_listed: Sequence[str] = ()


def decompress(
    path: Path,
    out: Path,
    force: bool = False,
    workers: int | None = None,
    start: Callable[[int, int], None] = lambda total_bytes, done_bytes: None,
    advance: Advance = ignore,
    shard_bytes: int = SHARD_BYTES,
    original: Path | None = None,
) -> Restored:
    """Write the tensors of the DFloat11 checkpoint `path` into the folder `out`, with the files beside them.

    Shards are cut at `shard_bytes` and get their names when they are complete; the index is written last. Continues an
    earlier run with the same arguments that was interrupted. If the checkpoint has a manifest, its weight files are
    compared with that before anything is written.

    Args:
        path: a DFloat11 checkpoint, ours or an official one.
        out: a new or empty folder, or one in which the same was started or finished.
        force: accept any other folder, and replace the checkpoint in it.
        workers: processes; by default as many as cores and memory allow.
        start: called with the bytes to be compared and written in all, and with those that an earlier run has written,
            if they are known by then.
        advance: called with the bytes that were compared or written since its last call.
        shard_bytes: the largest size of a file, unless one tensor is larger.
        original: model that tells the shapes of the weights, where the checkpoint's manifest or config does not; where
            they do, all must agree.

    Raises:
        ChangedError: a file of the checkpoint was changed meanwhile.
        FormatError: the checkpoint is damaged, its weight files differ from its manifest, `original` is that of another
            checkpoint, or `out` cannot be used.
        UnsupportedError: nothing tells the shapes of its weights.
        DFloatError: the disk is full.
    """
    files = SourceFiles(path, weight_files)
    checkpoint = open_checkpoint(path)
    items = plan(checkpoint, _shapes(checkpoint, original))
    not_sought = _refuse_missing(checkpoint, original)
    checkpoint.validate()
    files.check()
    shards = {shard.file: shard for shard in _shards(items, shard_bytes)}
    conversion = _Decompression(
        task=DECOMPRESSION,
        source=files,
        target=out,
        identity=_identity(checkpoint, items, shard_bytes),
        sizes={file: shard.num_bytes for file, shard in shards.items()},
        beside=frozenset({INDEX_FILE}),
        checkpoint=checkpoint,
        shards=shards,
        workers=workers,
        start=start,
        advance=advance,
        not_sought=not_sought,
    )
    report, was_finished = convert(conversion, force)
    return Restored(**report, was_finished=was_finished)


def _shapes(checkpoint: Dfloat11Checkpoint, original: Path | None) -> Shapes:
    """Return the shapes of a checkpoint's weights: its own, or else, or if these agree, those of the original.

    Raises:
        FormatError: the original is damaged, is no original, or has other shapes than the checkpoint says itself.
        UnsupportedError: nothing tells the shapes.
    """
    if original is None:
        advice = "With --original FOLDER, the weight files of the BF16 model tell them."
        return shapes_of(checkpoint, advice=advice)
    shapes = original_shapes(original)
    try:
        own = shapes_of(checkpoint)
    except UnsupportedError:  # then the original alone tells them
        return shapes
    source = f"{checkpoint.path / (MANIFEST_FILE if checkpoint.manifest else CONFIG_FILE)}"
    members = [item for item in plan(checkpoint, shapes) if isinstance(item, Member)]
    weights = {item.name.removesuffix(".weight"): item.shape for item in members}
    refuse_other_shapes(weights, own, source, original)
    return shapes


def _refuse_missing(checkpoint: Dfloat11Checkpoint, original: Path | None) -> str:
    """Refuse a checkpoint that lacks tensors of its model.

    Returns:
        Why that could not be checked, "" if it was: by the config of the original, or else by its own.

    Raises:
        FormatError: one is missing.
    """
    if checkpoint.manifest:  # compared with what is there when it was opened
        return ""
    not_sought = ""
    for described_by in filter(None, (original, checkpoint.path)):
        not_sought = refuse_missing_parameters(checkpoint.path, checkpoint.names, described_by)
        if not not_sought:
            break
    return not_sought


def _identity(
    checkpoint: Dfloat11Checkpoint, items: Sequence[Member | StoredTensor], shard_bytes: int
) -> str:
    units = (tensor for unit in checkpoint.units.values() for tensor in unit.fields.values())
    digest = identity_of(checkpoint.config, [*units, *checkpoint.plain.values()])
    shapes = hashlib.sha256(str([(item.name, item.shape) for item in items]).encode()).hexdigest()
    return f"{digest} {shapes} {shard_bytes}"  # shapes may come from another model


def _shards(items: Sequence[Member | StoredTensor], limit: int) -> list[Shard]:
    """Return the items in their order, cut where a shard would exceed `limit` bytes."""
    parts: list[list[Member | StoredTensor]] = [[]]
    filled = 0
    for item in items:
        if parts[-1] and filled + num_bytes(item) > limit:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += num_bytes(item)
    if len(parts) == 1:
        return [Shard("model.safetensors", tuple(parts[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", tuple(part))
        for number, part in enumerate(parts, 1)
    ]


@dataclass(frozen=True)
class _Decompression(Conversion[FileResult]):
    checkpoint: Dfloat11Checkpoint
    shards: Mapping[str, Shard]
    workers: int | None
    start: Callable[[int, int], None]
    advance: Advance
    not_sought: str

    def prepare(self) -> None:
        manifest, folder = self.checkpoint.manifest, self.checkpoint.path
        if manifest:
            check_place(folder, self.target, self.task)
            self.start(weight_bytes(manifest) + sum(self.sizes.values()), 0)
            with self.source.unchanged():
                refuse_other_weights(folder, manifest, self.advance)

    def begin(self, done_bytes: int) -> None:
        if self.checkpoint.manifest:  # then it has begun with comparing
            self.advance(done_bytes)
        else:
            self.start(sum(self.sizes.values()), done_bytes)

    def result(self, line: Mapping[str, Any]) -> FileResult:
        return FileResult.from_json(line)

    def make(self, files: Sequence[str], target: FolderLock) -> Iterable[FileResult]:
        call: Callable[..., FileResult] = decompress_file
        jobs = [(self.shards[file], target.path) for file in files]
        total = sum(self.sizes[file] for file in files)
        return run_on_cores(call, jobs, self.workers, WORKER_BYTES, total, self.advance, target)

    def finish(self, work: Work, results: Sequence[FileResult]) -> dict[str, Any]:
        folder, manifest, side = self.checkpoint.path, self.checkpoint.manifest, self.source.side
        for name in side.names:
            work.copy(folder, name, self.source.identity(name))
        copied = {name: work.entries[name] for name in side.names}
        self.source.check()  # before the files are there that make the folder a model
        total = sum(self.sizes.values())
        weight_map = {
            item.name: file for file, shard in self.shards.items() for item in shard.items
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        work.write_text(CONFIG_FILE, config_text(self.checkpoint.config, None))
        work.write_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")
        return {
            "tensors": sum(len(shard.items) for shard in self.shards.values()),
            "num_bytes": total,
            "left_out": dict(side.left_out),
            "not_sought": self.not_sought,
            "not_as_listed": others(folder, manifest, copied) if manifest else (),
        }
