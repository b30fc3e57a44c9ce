"""Compress a BF16 model into an official DFloat11 checkpoint, file by file."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, CONFIG_KEY
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, Manifest, digest_of
from vllm_dfloat.checkpoint.names import module_of, transformer_block
from vllm_dfloat.convert.compress_file import CompressedFile, FileJob, compress_file
from vllm_dfloat.convert.conversion import Conversion, convert
from vllm_dfloat.convert.cores import WORKER_BYTES, run_on_cores
from vllm_dfloat.convert.read_back import read_back, refuse_unit_names
from vllm_dfloat.convert.resume import COMPRESSION
from vllm_dfloat.convert.source import Source, config_text
from vllm_dfloat.convert.units import PlannedUnit, UnitPlan, build_patterns, plan_units
from vllm_dfloat.convert.work import Work
from vllm_dfloat.convert.worker_pool import run_in_threads
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
        bf16_bytes: size of all weight files of the source, without headers.
        num_bytes: size of all weight files of the target.
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
    """Write `source` as a DFloat11 checkpoint into the folder `target`; continue an earlier run that was interrupted.

    Args:
        source: an open BF16 model, which is only read.
        target: a new or empty folder, or one in which the same compression was started or finished.
        force: accept any other folder, and replace the checkpoint in it.
        workers: processes; by default as many as cores and memory allow. With a coder, threads; by default one.
        start: called with the bytes to be read in all, and with those that an earlier run has read.
        advance: called with the bytes that were read since its last call.
        coder: encodes and compares in this process; by default the CPU does, in other processes.

    Raises:
        ChangedError: a file of the source was changed meanwhile.
        FormatError: `target` cannot be used, or what was written does not decode to the original.
        UnsupportedError: there is nothing to compress in `source`, or a tensor has the name of a part of a unit.
        DFloatError: the disk is full.
    """
    began = time.monotonic()
    plan = plan_units(source.config, source.tensors)
    if not plan.units:
        _refuse_nothing(source)
    refuse_unit_names(source.path, source.tensors)
    jobs = {job.file: job for job in plan_files(plan, source)}
    sizes = {file: _num_bytes(source, job.tensors) for file, job in jobs.items()}
    conversion = _Compression(
        task=COMPRESSION,
        source=source.files,
        target=target,
        identity=source.identity(),
        sizes=sizes,
        beside=frozenset(),
        model=source,
        plan=plan,
        jobs=jobs,
        workers=workers,
        coder=coder,
        start=start,
        report=WholeBytes(advance),
    )
    report, was_finished = convert(conversion, force)
    return Report(**report, seconds=time.monotonic() - began, was_finished=was_finished)


def _refuse_nothing(source: Source) -> NoReturn:
    found = sorted({tensor.dtype for tensor in source.tensors.values()})
    advice = "Serve it as it is."
    if any(t.dtype in ("F16", "F32") and len(t.shape) > 1 for t in source.tensors.values()):
        advice = (
            "Save it in BF16 first, which rounds its weights, or let vLLM do so: vllm serve "
            f"{shlex.quote(str(source.path))} --dtype bfloat16 --quantization dfloat11."
        )
    raise UnsupportedError(
        f"{source.path}: holds no BF16 weight of a linear or embedding layer, but {', '.join(found)}; expected some, "
        f"since others are not compressed. {advice}"
    )


def _num_bytes(source: Source, names: Iterable[str]) -> int:
    """Return how many bytes of the source these tensors take."""
    return sum(source.tensors[name].num_bytes for name in names)


def plan_files(plan: UnitPlan, source: Source) -> list[FileJob]:
    """Return the files of the checkpoint: one per transformer block or other unit, and one for the rest.

    Experts, which are units of their own, share files of up to `FILE_BYTES`.
    """
    sizes = {name: tensor.num_bytes for name, tensor in source.tensors.items()}
    used = {name for unit in plan.units for name in unit.tensors}
    plain = {name: sizes[name] for name in source.tensors if name not in used}
    files_of: dict[str, list[list[PlannedUnit]]] = {}
    for unit in plan.units:
        files = files_of.setdefault(transformer_block(unit.name), [[]])
        filled = sum(sizes[name] for other in files[-1] for name in other.tensors)
        if files[-1] and filled + sum(sizes[name] for name in unit.tensors) > FILE_BYTES:
            files.append([])
        files[-1].append(unit)
    owner = {
        name: place
        for name in plain
        for place in (transformer_block(name), module_of(name))
        if place in files_of
    }
    jobs: list[FileJob] = []
    taken = {REST_FILE}
    for place, files in files_of.items():
        for i, units in enumerate(files):
            beside = (
                tuple(sorted(name for name in plain if owner.get(name) == place)) if i == 0 else ()
            )
            file = _file_name(place if i == 0 else f"{place}.{i:05}", taken)
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


@dataclass(frozen=True)
class _Compression(Conversion[CompressedFile]):
    model: Source
    plan: UnitPlan
    jobs: Mapping[str, FileJob]
    workers: int | None
    coder: Coder | None
    start: Callable[[int, int], None]
    report: Advance

    def begin(self, done_bytes: int) -> None:
        self.start(sum(self.sizes.values()), done_bytes)

    def result(self, line: Mapping[str, Any]) -> CompressedFile:
        return CompressedFile.from_json(line)

    def make(self, files: Sequence[str], target: FolderLock) -> Iterable[CompressedFile]:
        # Large files first, so that no worker begins one when the others have nothing left.
        jobs = [self.jobs[file] for file in sorted(files, key=lambda file: -self.sizes[file])]
        arguments = [
            (job, {n: self.model.tensors[n] for n in job.tensors}, target.path, self.coder)
            for job in jobs
        ]
        call: Callable[..., CompressedFile] = compress_file
        if self.coder:
            return run_in_threads(call, arguments, self.workers or 1, self.report)
        sizes = [self.sizes[file] for file in files]
        # Gaps and positions are held, 1.3 % of the weights in files of typical weights.
        largest = WORKER_BYTES + max(sizes, default=0) // 50
        return run_on_cores(call, arguments, self.workers, largest, sum(sizes), self.report, target)

    def finish(self, work: Work, results: Sequence[CompressedFile]) -> dict[str, Any]:
        source, units = self.model, [unit for result in results for unit in result.units]
        for name in source.files.side.names:
            work.copy(source.path, name, source.files.identity(name))
        source.files.check()  # before the files are there that make the folder a model
        text = config_text(source.config, build_patterns(units))
        work.write_text(CONFIG_FILE, text)
        shapes = {name: source.tensors[name].shape for unit in units for name in unit.tensors}
        try:
            headers = {result.file: header_sha256(work.folder / result.file) for result in results}
            digest = digest_of(json.loads(text)[CONFIG_KEY])
            manifest = Manifest(work.entries, shapes, headers, digest)
            work.write_text(MANIFEST_FILE, manifest.as_text())
            read_back(work.folder, source.tensors)
        except DFloatError:
            work.check()  # another program that has changed a file explains it
            raise
        left = dict(self.plan.left)
        for result in results:
            left.update(result.left)
        return {
            "bf16_bytes": _num_bytes(source, source.tensors),
            "num_bytes": sum(result.num_bytes for result in results),
            "units": len(units),
            "left": left,
            "left_out": dict(source.files.side.left_out),
        }
