"""Compress a BF16 model into an official DFloat11 checkpoint, file by file, so that it can be interrupted."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, Manifest
from vllm_dfloat.checkpoint.names import module_of, transformer_block
from vllm_dfloat.codec.threads import num_threads
from vllm_dfloat.convert.compress_file import FileJob, FileResult, compress_file
from vllm_dfloat.convert.finished import (
    find_finished,
    find_or_make,
    refuse_leftovers,
    write_finished,
)
from vllm_dfloat.convert.read_back import read_back, refuse_unit_names
from vllm_dfloat.convert.resume import COMPRESSION, resumable
from vllm_dfloat.convert.source import Source, config_text
from vllm_dfloat.convert.units import PlannedUnit, UnitPlan, build_patterns, plan_units
from vllm_dfloat.convert.work import Work
from vllm_dfloat.convert.worker_pool import (
    WORKER_BYTES,
    available_memory,
    run_in_threads,
    run_jobs,
    share_cores,
)
from vllm_dfloat.dfloat11.coder import Coder
from vllm_dfloat.errors import DFloatError, UnsupportedError
from vllm_dfloat.storage.folder_lock import FolderLock
from vllm_dfloat.storage.progress import Advance, WholeBytes
from vllm_dfloat.storage.safetensors_read import header_sha256

REST_FILE = "model.safetensors"
FILE_BYTES = 2 << 30  # BF16 bytes of the units that share a file, unless one alone has more


@dataclass(frozen=True)
class Report:
    """What a compression did.

    Attributes:
        bf16_bytes: all weight files of the source take together, headers not counted.
        num_bytes: the same of the target.
        units: how many units it holds.
        left: tensor name -> why it was not compressed.
        left_out: file beside the weights -> why it was not copied.
        seconds: how long it took.
        was_finished: an earlier run had done everything.
    """

    bf16_bytes: int
    num_bytes: int
    units: int
    left: Mapping[str, str]
    left_out: Mapping[str, str]
    seconds: float
    was_finished: bool = False


def compress(
    source: Source,
    target: Path,
    force: bool = False,
    workers: int | None = None,
    start: Callable[[int, int], None] = lambda total_bytes, done_bytes: None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    coder: Coder | None = None,
) -> Report:
    """Write `source` as a DFloat11 checkpoint into the folder `target`; go on where an earlier run was ended.

    Args:
        source: an open BF16 model, which is only read.
        target: a new or empty folder, or one in which the same compression was begun or finished.
        force: take another folder too, and replace the checkpoint in it.
        workers: processes; by default as many as cores and memory allow. With a coder, threads; by default one.
        start: called with the bytes to be read in all, and with those that an earlier run has read.
        advance: called with the bytes that were done since.
        coder: what encodes and compares, in this process; by default the CPU, in processes.

    Raises:
        ChangedError: a file of the source was changed meanwhile.
        FormatError: `target` cannot be used, or what was written does not decode to the original.
        UnsupportedError: there is nothing to compress in `source`, or a tensor is named as those of a unit are.
        DFloatError: the disk is full.
    """
    began = time.monotonic()
    plan = plan_units(source.config, source.tensors)
    if not plan.units:
        found = sorted({tensor.dtype for tensor in source.tensors.values()})
        raise UnsupportedError(
            f"{source.path}: holds no BF16 weight of a linear or embedding layer (its dtypes: {', '.join(found)}); "
            "there is nothing to compress."
        )
    refuse_unit_names(source.path, source.tensors)
    identity = source.identity()

    def find() -> Mapping[str, Any] | None:
        return None if force else find_finished(target, COMPRESSION, identity, source.files)

    def make() -> Mapping[str, Any]:
        begun = resumable(source.path, target, COMPRESSION, identity, force)
        with begun as work, source.files.unchanged():
            jobs = plan_files(plan, source)
            sizes = {job.file: _num_bytes(source, job) for job in jobs}
            refuse_leftovers(target, {*sizes, *source.files.side.names})
            done = work.resume(set(sizes))
            results = {file: FileResult.from_json(line) for file, line in done.items()}
            start(sum(sizes.values()), sum(sizes[file] for file in results))
            todo = [job for job in jobs if job.file not in results]
            for result in _run(source, work.lock, todo, sizes, workers, coder, WholeBytes(advance)):
                work.append(result.as_json())
                results[result.file] = result
            report = _finish(source, work, plan, [results[job.file] for job in jobs])
            write_finished(work, COMPRESSION, identity, source.files, report)
        return report

    report, was_finished = find_or_make(find, make)
    return Report(**report, seconds=time.monotonic() - began, was_finished=was_finished)


def _num_bytes(source: Source, job: FileJob) -> int:
    """Return how many bytes of the source a job reads."""
    return sum(source.tensors[name].num_bytes for name in job.tensors)


def plan_files(plan: UnitPlan, source: Source) -> list[FileJob]:
    """Return the files of the checkpoint: one per block or other unit, with what belongs to it, and one for the rest.

    Experts, which are units of their own, share files of up to `FILE_BYTES`.
    """
    sizes = {name: tensor.num_bytes for name, tensor in source.tensors.items()}
    used = {name for unit in plan.units for name in unit.tensors}
    plain = {name: sizes[name] for name in source.tensors if name not in used}
    groups: dict[str, list[list[PlannedUnit]]] = {}
    for unit in plan.units:
        files = groups.setdefault(transformer_block(unit.name), [[]])
        filled = sum(sizes[name] for other in files[-1] for name in other.tensors)
        if files[-1] and filled + sum(sizes[name] for name in unit.tensors) > FILE_BYTES:
            files.append([])
        files[-1].append(unit)
    owner = {
        name: block
        for name in plain
        for block in (transformer_block(name), module_of(name))
        if block in groups
    }
    jobs: list[FileJob] = []
    taken = {REST_FILE}
    for block, files in groups.items():
        for i, units in enumerate(files):
            beside = (
                tuple(sorted(name for name in plain if owner.get(name) == block)) if i == 0 else ()
            )
            file = _file_name(block if i == 0 else f"{block}.{i:05}", taken)
            jobs.append(FileJob(file, tuple(units), beside))
    rest = tuple(sorted(name for name in plain if name not in owner))
    return [*jobs, FileJob(REST_FILE, (), rest, {"format": "pt"})] if rest else jobs


def _file_name(path: str, taken: set[str]) -> str:
    """Return a new file name for a module path, as the official package forms them."""
    stem = re.sub(r"[^\w-]", "_", path, flags=re.ASCII)[:150]
    name, number = f"{stem}.safetensors", 1
    while name in taken:
        number += 1
        name = f"{stem}~{number}.safetensors"
    taken.add(name)
    return name


def _run(
    source: Source,
    target: FolderLock,
    jobs: Sequence[FileJob],
    sizes: Mapping[str, int],
    workers: int | None,
    coder: Coder | None,
    report: Advance,
) -> Iterable[FileResult]:
    # Large files first, so that no worker begins one when the others have nothing left.
    arguments = [
        (job, {name: source.tensors[name] for name in job.tensors}, target.path, coder)
        for job in sorted(jobs, key=lambda job: -sizes[job.file])
    ]
    call: Callable[..., FileResult] = compress_file
    if coder:
        return run_in_threads(call, arguments, workers or 1, report)
    cores = num_threads()
    if workers is None:
        # Gaps and positions are held, 1.3 % of the weights in files of typical weights.
        largest = WORKER_BYTES + max((sizes[job.file] for job in jobs), default=0) // 50
        total = sum(sizes[job.file] for job in jobs)
        workers = share_cores(cores, len(jobs), largest, total, int(0.8 * available_memory()))
    return run_jobs(call, arguments, workers, max(1, cores // workers), report, target)


def _finish(
    source: Source, work: Work, plan: UnitPlan, results: Sequence[FileResult]
) -> dict[str, Any]:
    """Write everything beside the weights; return the fields of a Report without the time."""
    units = [unit for result in results for unit in result.units]
    for name in source.files.side.names:
        work.copy(source.path, name, source.files.identity(name))
    source.files.check()  # before the files are there that make the folder a model
    work.write_text(CONFIG_FILE, config_text(source.config, build_patterns(units)))
    shapes = {name: source.tensors[name].shape for unit in units for name in unit.tensors}
    headers = {result.file: header_sha256(work.folder / result.file) for result in results}
    work.write_text(MANIFEST_FILE, Manifest(work.entries, shapes, headers).as_text())
    try:
        read_back(work.folder, source.tensors)
    except DFloatError:
        work.check()  # another program that has changed a file explains it
        raise
    left = dict(plan.left)
    for result in results:
        left.update(result.left)
    return {
        "bf16_bytes": sum(tensor.num_bytes for tensor in source.tensors.values()),
        "num_bytes": sum(result.num_bytes for result in results),
        "units": len(units),
        "left": left,
        "left_out": dict(source.files.side.left_out),
    }
