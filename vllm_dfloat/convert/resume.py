"""Resumable output folders: the same command continues a run that was interrupted."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vllm_dfloat.checkpoint.folder import COMPRESS_JOURNAL, DECOMPRESS_JOURNAL
from vllm_dfloat.convert.leftovers import (
    clear,
    made_before,
    refuse_leftovers,
    refuse_other_kinds,
    remove_old_copies,
)
from vllm_dfloat.convert.work import Work
from vllm_dfloat.errors import DFloatError, FormatError
from vllm_dfloat.storage.folder_lock import locked
from vllm_dfloat.storage.journal import open_journal, read_lines, refuse_other_source
from vllm_dfloat.storage.safetensors_write import TEMPORARY


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
def resumable(
    source: Path, target: Path, task: Task, identity: str, force: bool, makes: Collection[str]
) -> Iterator[Work]:
    """Make and lock the folder `target` for a task that fills it from `source`.

    The folder must be new, empty, or started by the same task. With `force` it may be any; the checkpoint in it is
    removed. The journal is removed when the `with` block ends without an error.

    Args:
        source: the folder that is read.
        target: the folder that is made.
        task: what is being made.
        identity: of the source; a journal with another identity is refused.
        force: accept any folder.
        makes: the files that the task will make or copy, relative to the folder.

    Raises:
        OccupiedError: the folder is not empty, and the task was not started in it.
        FormatError: the folder cannot be used, another task was started in it, another process works in it, or it holds
            files of others that would change the model.
        DFloatError: the disk is full.
    """
    check_place(source, target, task)
    try:
        with locked(target) as lock:
            # Only under the lock: files of a run that is still working must be neither judged nor removed.
            if not force:
                _check_content(target, task)
                # First of all: the files of another model's run are that run's, and are not to be moved away.
                refuse_other_source(target / task.journal, task.name, identity)
            refuse_other_kinds(target, makes)
            # Without a line in its journal, the task has not yet removed what was there.
            is_anew = force or not read_lines(target / task.journal)
            refuse_leftovers(target, {*makes, *made_before(target)}, is_replaced=is_anew)
            anew = partial(clear, target, task.journal)
            with open_journal(target / task.journal, task.name, identity, force, anew) as journal:
                remove_old_copies(target, makes)
                for stale in target.rglob(f"{TEMPORARY}*"):
                    if not stale.is_dir():
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
    """Refuse a target that lies inside or around the source, or is a file or a link to nowhere, or lies in one.

    Raises:
        FormatError: it is one of these.
    """
    expected = f"expected a new or empty folder, or one in which a {task.name} was begun"
    for place in reversed((target, *target.absolute().parents)):
        if (place.is_symlink() or place.exists()) and not place.is_dir():
            what = "a link that leads to no folder" if place.is_symlink() else "a file"
            where = f"in the folder {target.parent}" if place == target else f"named {place}"
            lies = "is" if place == target else "lies in"
            raise FormatError(
                f"{target}: {lies} {what} {where}; {expected}. Choose another, or move that away."
            )
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise FormatError(
            f"{target}: lies in {source} or around it; the source is never touched. Choose another."
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
