"""Write a DFloat11 checkpoint back as BF16 safetensors with an index, bit for bit, shard by shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.listing import INDEX_FILE, weight_files
from vllm_dfloat.checkpoint.model_class import refuse_missing_parameters
from vllm_dfloat.checkpoint.reader import Dfloat11Checkpoint, open_checkpoint
from vllm_dfloat.checkpoint.shapes import Shapes, module_shapes, original_shapes
from vllm_dfloat.checkpoint.weights import Member, plan
from vllm_dfloat.codec.threads import num_threads
from vllm_dfloat.convert.decompress_file import Shard, decompress_file, num_bytes
from vllm_dfloat.convert.finished import (
    find_finished,
    find_or_make,
    refuse_leftovers,
    write_finished,
)
from vllm_dfloat.convert.listed_files import others, refuse_other_weights, weight_bytes
from vllm_dfloat.convert.resume import DECOMPRESSION, check_place, resumable
from vllm_dfloat.convert.source import config_text, identity_of
from vllm_dfloat.convert.source_files import SourceFiles
from vllm_dfloat.convert.work import Work
from vllm_dfloat.convert.worker_pool import WORKER_BYTES, available_memory, run_jobs, share_cores
from vllm_dfloat.storage.folder_lock import FolderLock
from vllm_dfloat.storage.progress import Advance, ignore
from vllm_dfloat.storage.safetensors_read import StoredTensor

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Restored:
    """What a decompression did.

    Attributes:
        tensors, num_bytes: how many tensors were written, and how many bytes they take.
        left_out: file beside the weights -> why it was not copied.
        not_sought: why nobody could tell whether tensors are missing, nothing if that was looked for.
        was_finished: an earlier run had done everything.
        not_as_listed: files beside the weights that are not what the checkpoint's manifest says.
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
    """Write the tensors of the DFloat11 checkpoint `path` into the folder `out`, with everything beside them.

    Shards are cut at `shard_bytes` and get their names when they are complete; the index comes last. Goes on where an
    earlier run with the same arguments was ended. Where the checkpoint has a manifest, its weight files are read and
    compared with it before anything is written.

    Args:
        path: a DFloat11 checkpoint, ours or an official one.
        out: a new or empty folder, or one in which the same was begun or finished.
        force: take another folder too, and replace the checkpoint in it.
        workers: processes; by default as many as cores and memory allow.
        start: called with the bytes to be compared and written in all, and with those that an earlier run has written
            as far as that is known by then.
        advance: called with the bytes that were compared or written since.
        shard_bytes: the largest size of a file, unless one tensor alone takes more.
        original: where the shapes of the weights come from instead of manifest and config of the checkpoint.

    Raises:
        ChangedError: a file of the checkpoint was changed meanwhile.
        FormatError: the checkpoint is damaged, its weight files are not those of its manifest, or `out` cannot be used.
        UnsupportedError: the shapes of its weights cannot be found out.
        DFloatError: the disk is full.
    """
    files = SourceFiles(path, weight_files)
    checkpoint = open_checkpoint(path)
    items = plan(checkpoint, _shapes(path, original), keep_tied=True)
    not_sought = ""
    for described_by in () if checkpoint.manifest else filter(None, (original, path)):
        not_sought = refuse_missing_parameters(path, checkpoint.names, described_by)
        if not not_sought:
            break
    checkpoint.validate()
    files.check()
    shards = _shards(items, shard_bytes)
    sizes = {shard.file: shard.num_bytes for shard in shards}
    identity = _identity(checkpoint, items, shard_bytes)

    def find() -> Mapping[str, Any] | None:
        return None if force else find_finished(out, DECOMPRESSION, identity, files)

    def make() -> Mapping[str, Any]:
        manifest = checkpoint.manifest
        if manifest:
            check_place(path, out, DECOMPRESSION)
            start(weight_bytes(manifest) + sum(sizes.values()), 0)
            with files.unchanged():
                refuse_other_weights(path, manifest, advance)
        begun = resumable(path, out, DECOMPRESSION, identity, force)
        with begun as work, files.unchanged():
            refuse_leftovers(out, {*sizes, *files.side.names, INDEX_FILE})
            done = work.resume(set(sizes))
            done_bytes = sum(sizes[file] for file in done)
            if manifest:
                advance(done_bytes)
            else:
                start(sum(sizes.values()), done_bytes)
            todo = [shard for shard in shards if shard.file not in done]
            for result in _run(work.lock, todo, workers, advance):
                work.append(result)
            copied = _write_rest(checkpoint, files, work, shards)
            report: dict[str, Any] = {
                "tensors": len(items),
                "num_bytes": sum(sizes.values()),
                "left_out": dict(files.side.left_out),
                "not_sought": not_sought,
                "not_as_listed": others(path, manifest, copied) if manifest else (),
            }
            write_finished(work, DECOMPRESSION, identity, files, report)
        return report

    report, was_finished = find_or_make(find, make)
    return Restored(**report, was_finished=was_finished)


def _shapes(path: Path, original: Path | None) -> Shapes:
    """Return the shapes of a checkpoint's weights; see `original_shapes`."""
    if original is None:
        return module_shapes(
            path, "With --original FOLDER, the weight files of the BF16 model tell them."
        )
    return original_shapes(original)


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


def _run(
    out: FolderLock, shards: Sequence[Shard], workers: int | None, advance: Advance
) -> Iterable[dict[str, Any]]:
    cores = num_threads()
    if workers is None:
        total = sum(shard.num_bytes for shard in shards)
        workers = share_cores(
            cores, len(shards), WORKER_BYTES, total, int(0.8 * available_memory())
        )
    call: Callable[..., dict[str, Any]] = decompress_file
    jobs = [(shard, out.path) for shard in shards]
    return run_jobs(call, jobs, workers, max(1, cores // workers), advance, out)


def _write_rest(
    checkpoint: Dfloat11Checkpoint, files: SourceFiles, work: Work, shards: Sequence[Shard]
) -> dict[str, dict[str, Any]]:
    """Write copies of all other files, config and index; return size and SHA-256 of the copies."""
    for name in files.side.names:
        work.copy(checkpoint.path, name, files.identity(name))
    copied = {name: work.entries[name] for name in files.side.names}
    files.check()  # before the files are there that make the folder a model
    total = sum(shard.num_bytes for shard in shards)
    weight_map = {item.name: shard.file for shard in shards for item in shard.items}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    work.write_text(CONFIG_FILE, config_text(checkpoint.config, None))
    work.write_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return copied
