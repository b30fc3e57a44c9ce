"""A folder that is made file by file, so that a run which was ended can be gone on with by the same command."""

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
from vllm_dfloat.storage.json_file import read_object
from vllm_dfloat.storage.safetensors_write import TEMPORARY

_MAX_BYTES = 256 << 20  # of a list of files
_CHECKPOINT_FILES = ("*.safetensors", "*.safetensors.index.json", MANIFEST_FILE)


class OccupiedError(FormatError):
    """A folder that is to be made holds something else: it may have been finished meanwhile."""


@dataclass(frozen=True)
class Task:
    """What is being made.

    Attributes:
        name: what to call it in messages, such as "compression".
        journal: the file in the folder that says what of it is done.
    """

    name: str
    journal: str


COMPRESSION = Task("compression", COMPRESS_JOURNAL)
DECOMPRESSION = Task("decompression", DECOMPRESS_JOURNAL)
TASKS = (COMPRESSION, DECOMPRESSION)


@contextmanager
def resumable(source: Path, target: Path, task: Task, identity: str, force: bool) -> Iterator[Work]:
    """Make and lock the folder `target`, and give it to a task that makes it from `source`.

    The folder must be new, empty, begun by the same task, or forced: then the checkpoint in it is removed. The journal
    is removed when the block ends without an error.

    Args:
        source: the folder that is read.
        target: the folder that is made.
        task: what is being made.
        identity: of what is read; a journal of another one is refused.
        force: take another folder too.

    Raises:
        OccupiedError: the folder is not empty, and nothing of the task was begun in it.
        FormatError: the folder cannot be used, holds the beginning of another task, or another process works in it.
        DFloatError: the disk is full.
    """
    check_place(source, target, task)
    try:
        with locked(target) as lock:
            # Only now: what another run does in the folder until it ends is not to be judged or removed.
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
    """Refuse a target that lies in the source or around it, or is no folder.

    Raises:
        FormatError: it does, or is none.
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
    if all(begun):  # a forced run was killed before it had removed the other's journal
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
    """Remove the checkpoint in the folder, with all that was made with it, and the beginning of another task."""
    made = _made_before(target)
    for other in TASKS:
        if other != task:
            discard_journal(target / other.journal)
    for name in made - {MANIFEST_FILE, FINISHED_FILE}:
        file = target / name
        is_inside = file.parent.resolve().is_relative_to(target.resolve())
        if is_inside and (file.is_file() or file.is_symlink()):
            file.unlink()
    # The lists of what was made come last: after a kill the next run finds them again.
    for pattern in _CHECKPOINT_FILES:
        for file in visible_files(target, pattern):
            file.unlink()
    (target / FINISHED_FILE).unlink(missing_ok=True)


def _made_before(target: Path) -> set[str]:
    """Return the files that a manifest or a finished run lists, nothing of damaged ones."""
    names: set[str] = set()
    for file in (MANIFEST_FILE, FINISHED_FILE):
        try:
            content = read_object(target / file, _MAX_BYTES) or {}
        except FormatError:
            continue
        listed = content.get("files")
        names.update(name for name in (listed if isinstance(listed, dict) else ()))
    return names
