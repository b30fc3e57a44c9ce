"""Resumable output folders: the same command continues a run that was interrupted."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_dfloat.checkpoint.folder import COMPRESS_JOURNAL, DECOMPRESS_JOURNAL, FINISHED_FILE
from vllm_dfloat.checkpoint.listing import visible_files
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.convert.work import Work
from vllm_dfloat.errors import DFloatError, FormatError
from vllm_dfloat.storage.folder_lock import locked
from vllm_dfloat.storage.journal import discard_journal, open_journal
from vllm_dfloat.storage.json_file import MAX_LIST_BYTES, read_object
from vllm_dfloat.storage.safetensors_write import TEMPORARY

_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", MANIFEST_FILE)


class OccupiedError(FormatError):
    """The output folder holds something else; another run may have finished it meanwhile."""


@dataclass(frozen=True)
class Task:
    """What is being made.

    Attributes:
        name: for messages, such as "compression".
        journal: the file in the folder that lists what is done.
    """

    name: str
    journal: str


COMPRESSION = Task("compression", COMPRESS_JOURNAL)
DECOMPRESSION = Task("decompression", DECOMPRESS_JOURNAL)
TASKS = (COMPRESSION, DECOMPRESSION)


@contextmanager
def resumable(source: Path, target: Path, task: Task, identity: str, force: bool) -> Iterator[Work]:
    """Make and lock the folder `target` for a task that fills it from `source`.

    The folder must be new, empty, or started by the same task. With `force` it may be any; the checkpoint in it is
    removed. The journal is removed when the `with` block ends without an error.

    Args:
        source: the folder that is read.
        target: the folder that is made.
        task: what is being made.
        identity: of the source; a journal with another identity is refused.
        force: accept any folder.

    Raises:
        OccupiedError: the folder is not empty, and the task was not started in it.
        FormatError: the folder cannot be used, another task was started in it, or another process works in it.
        DFloatError: the disk is full.
    """
    check_place(source, target, task)
    try:
        with locked(target) as lock:
            # Only under the lock: files of a run that is still working must be neither judged nor removed.
            if not force:
                _check_content(target, task)
            clear = partial(_clear, target, task)
            with open_journal(target / task.journal, task.name, identity, force, clear) as journal:
                for stale in target.rglob(f"{TEMPORARY}*"):
                    stale.unlink()
                work = Work(lock, journal)
                try:
                    yield work
                except Exception:
                    lock.check()  # explains any error
                    raise
                work.check()
                (target / task.journal).unlink()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DFloatError(
            f"{target}: {error.strerror}. What is finished stays: free some space and run the same command again."
        ) from error


def check_place(source: Path, target: Path, task: Task) -> None:
    """Refuse a target that lies inside or around the source, or is a file.

    Raises:
        FormatError: it is one of these.
    """
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise FormatError(
            f"{target}: lies in {source} or around it; the source is never touched. Choose another."
        )
    if target.exists() and not target.is_dir():
        raise FormatError(
            f"{target}: is a file in the folder {target.parent}; expected a new or empty folder, or one in which a "
            f"{task.name} was begun."
        )


def _check_content(target: Path, task: Task) -> None:
    begun = [(target / other.journal).exists() for other in TASKS]
    if all(begun):  # a run with --force was killed before it removed the other task's journal
        raise FormatError(
            f"{target}: holds the beginnings of a compression and of a decompression; give --force to start anew, or "
            "choose a new folder."
        )
    if any(target.iterdir()) and not (target / task.journal).exists():
        raise OccupiedError(
            f"{target}: is not empty, and not the beginning of a {task.name}; give --force to replace the checkpoint "
            "in it, or choose a new folder."
        )


def _clear(target: Path, task: Task) -> None:
    """Remove the checkpoint in the folder with all files made with it, and the journals of other tasks."""
    made = _made_before(target)
    for other in TASKS:
        if other != task:
            discard_journal(target / other.journal)
    for name in made - {MANIFEST_FILE, FINISHED_FILE}:
        file = target / name
        is_inside = file.parent.resolve().is_relative_to(target.resolve())
        if is_inside and (file.is_file() or file.is_symlink()):
            file.unlink()
    # The lists of files go last: if this run is killed, the next one still finds them.
    for pattern in _CHECKPOINT_FILES:
        for file in visible_files(target, pattern):
            file.unlink()
    (target / FINISHED_FILE).unlink(missing_ok=True)


def _made_before(target: Path) -> set[str]:
    """Return the files listed by a manifest or a finished run; damaged lists are ignored."""
    names: set[str] = set()
    for file in (MANIFEST_FILE, FINISHED_FILE):
        try:
            content = read_object(target / file, MAX_LIST_BYTES) or {}
        except FormatError:
            continue
        listed = content.get("files")
        names.update(name for name in (listed if isinstance(listed, dict) else ()))
    return names
