"""What compressing and decompressing share: one folder is made from another, file by file, and may be interrupted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Self, TypeVar

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.convert.finished import find_finished, write_finished
from vllm_dfloat.convert.resume import OccupiedError, Task, resumable
from vllm_dfloat.convert.source_files import SourceFiles
from vllm_dfloat.convert.work import Work
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.folder_lock import FolderLock


@dataclass(frozen=True)
class FileResult:
    """A file that was written: its name, its size in bytes and its SHA-256. Also a line of the journal."""

    file: str
    num_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(content["file"], content["num_bytes"], content["sha256"])


Result = TypeVar("Result", bound=FileResult)


@dataclass(frozen=True)
class Conversion(ABC, Generic[Result]):
    """How a folder is made from another.

    Attributes:
        task: what is done.
        source: the files that are read.
        target: the folder that is made.
        identity: of what is made: the same source with the same options.
        sizes: name of each weight file to be made -> the bytes that count for progress.
        beside: other files that are made and belong to the weights, such as an index.
    """

    task: Task
    source: SourceFiles
    target: Path
    identity: str
    sizes: Mapping[str, int]
    beside: frozenset[str]

    def prepare(self) -> None:
        """Do what must be done before the target is touched."""

    @abstractmethod
    def begin(self, done_bytes: int) -> None:
        """Report that files will be made now; an earlier run has made `done_bytes` of them."""

    @abstractmethod
    def result(self, line: Mapping[str, Any]) -> Result:
        """Return the result of a file from the journal of an earlier run."""

    @abstractmethod
    def make(self, files: Sequence[str], target: FolderLock) -> Iterable[Result]:
        """Make these files in the target, in any order."""

    @abstractmethod
    def finish(self, work: Work, results: Sequence[Result]) -> dict[str, Any]:
        """Write everything beside the weights; return the report, for JSON."""


def convert(job: Conversion[Result], force: bool) -> tuple[Mapping[str, Any], bool]:
    """Make a folder; return the report on it, and whether an earlier run had done everything.

    Raises:
        ChangedError: a file of the source was changed meanwhile.
        FormatError: the target cannot be used.
        DFloatError: the disk is full.
    """
    if known := _find(job, force):
        return known, True
    try:
        return _make(job, force), False
    except OccupiedError:
        if known := _find(job, force):  # by another run, for which this one has waited
            return known, True
        raise


def _find(job: Conversion[Result], force: bool) -> Mapping[str, Any] | None:
    return None if force else find_finished(job.target, job.task, job.identity, job.source)


def _make(job: Conversion[Result], force: bool) -> Mapping[str, Any]:
    _refuse_collisions(job)
    job.prepare()
    makes = {*job.sizes, *job.source.side.names, *job.beside}
    begun = resumable(job.source.folder, job.target, job.task, job.identity, force, makes)
    with begun as work, job.source.unchanged():
        done = work.resume(set(job.sizes))
        results = {file: job.result(line) for file, line in done.items()}
        job.begin(sum(job.sizes[file] for file in results))
        todo = [file for file in job.sizes if file not in results]
        for result in job.make(todo, work.lock):
            work.append(result.as_json())
            results[result.file] = result
        report = job.finish(work, [results[file] for file in job.sizes])
        write_finished(work, job.task, job.identity, job.source, report)
    return report


def _refuse_collisions(job: Conversion[Result]) -> None:
    """Refuse a source with a file to be copied that has the place of a file to be made.

    Raises:
        FormatError: there is one; the message names it.
    """
    made = {*job.sizes, *job.beside, CONFIG_FILE, MANIFEST_FILE}
    for name in job.source.side.names:
        places = [name, *(parent.as_posix() for parent in PurePosixPath(name).parents)]
        if taken := next((place for place in places if place in made), None):
            raise FormatError(
                f"{job.source.folder / name}: has the place of {taken}, which is made in {job.target}; expected no "
                "file of that name beside the model's own. Move it out of the folder."
            )
