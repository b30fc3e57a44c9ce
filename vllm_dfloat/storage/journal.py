"""What an interrupted task has finished: one line per file, appended and synced.

The journal lies in the folder that is being made, and is removed at the end. The folder itself is locked
(folder_lock.py). The journal is locked too, because on NFS other machines see locks of files only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from vllm_dfloat.errors import FormatError

_VERSION = 1
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Journal:
    """An open, locked journal.

    Attributes:
        done: the lines that it had when it was opened.
    """

    def __init__(self, stream: IO[bytes], done: list[dict[str, Any]]) -> None:
        self._stream = stream
        self.done = done

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns.

        Raises:
            OSError: the disk is full, or the like; it names the journal.
        """
        try:
            self._stream.write(json.dumps(entry).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            error.filename = self._stream.name
            raise


@contextmanager
def open_journal(
    file: Path, task: str, identity: str, anew: bool, clear: Callable[[], None]
) -> Iterator[Journal]:
    """Open the journal `file` for a task (such as "compression") on the source `identity`, a new one if there is none.

    Args:
        anew: start again, whatever the journal says.
        clear: removes what an earlier run has left. Called before the journal gets its first line, so that it is called
            again if it was interrupted.

    Raises:
        FormatError: the journal belongs to another source, or another process has it open.
    """
    with file.open("ab+") as stream:
        _lock(file, stream)
        lines, size = _read(stream)
        if not anew:
            _check_head(file, task, identity, lines)
        if anew or not lines:
            clear()  # before the lines are lost that say what there is to be removed
            lines, size = [], 0
        stream.truncate(size)  # a line that was cut short
        journal = Journal(stream, lines[1:])
        if not lines:
            journal.append(_head(identity))
        yield journal


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal, the first of which names its source; none if there is none."""
    try:
        with file.open("rb") as stream:
            return _read(stream)[0]
    except OSError:
        return []


def refuse_other_source(file: Path, task: str, identity: str) -> None:
    """Refuse a journal of another source without opening it for a task; arguments and error as of `open_journal`."""
    if not file.is_symlink():
        _check_head(file, task, identity, read_lines(file))


@contextmanager
def discarding(file: Path) -> Iterator[None]:
    """Remove a journal, if there is one, when the `with` block ends without an error; lock it until then.

    Raises:
        FormatError: another process has it open.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(file.open("rb+"))
        except FileNotFoundError:
            yield
            return
        _lock(file, stream)
        yield
        file.unlink()


def _head(identity: str) -> dict[str, Any]:
    return {"version": _VERSION, "source": identity}


def _check_head(file: Path, task: str, identity: str, lines: list[dict[str, Any]]) -> None:
    if lines and lines[0] != _head(identity):
        raise FormatError(
            f"{file.parent}: holds the beginning of a {task} of other weights, or of files that were written to or "
            "touched since, or by another version; give --force to start anew, or choose another folder."
        )


def _lock(file: Path, stream: IO[bytes]) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = True
    except OSError as error:
        # Without locks of files only that of the folder is left, which other machines do not see.
        is_there = error.errno in _NO_LOCKS
    is_there = is_there and _leads_to(file, stream)
    if not is_there:  # locked by a run, or removed by one that ended just now
        raise FormatError(
            f"{file.parent}: another process is at work in this folder; wait for it, or choose another."
        )


def _leads_to(file: Path, stream: IO[bytes]) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _read(stream: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines and how many bytes they take."""
    stream.seek(0)
    lines, size = [], 0
    for line in stream:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(entry, dict):
            break
        lines.append(entry)
        size += len(line)
    return lines, size
