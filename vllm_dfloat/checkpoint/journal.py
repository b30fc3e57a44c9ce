"""What is done of a task that may be interrupted: one line per finished file, appended and synced.

The journal lies in the folder that is being made, and is removed when everything is done. The folder itself is locked
(folder_lock.py); the journal is locked too, because on NFS only locks of files are seen by other machines.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from vllm_dfloat.errors import FormatError

_VERSION = 1


class Journal:
    """An open, locked journal.

    Attributes:
        done: what the lines said that were there when it was opened.
    """

    def __init__(self, stream: TextIO, done: list[dict[str, Any]]) -> None:
        self._stream = stream
        self.done = done

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns.

        Raises:
            OSError: the disk is full, or the like; it names the journal.
        """
        try:
            self._stream.write(json.dumps(entry) + "\n")
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
        anew: forget what it says.
        clear: removes what is in the way of a new beginning; called before the journal has its first line, so that it
            is called again if it did not come to its end.

    Raises:
        FormatError: the journal is that of another source, or another process has it open.
    """
    with file.open("a+", encoding="utf-8") as stream:
        _lock(file, stream)
        lines, size = ([], 0) if anew else _read(stream)
        head = {"version": _VERSION, "source": identity}
        if lines and lines[0] != head:
            raise FormatError(
                f"{file.parent}: holds the beginning of a {task} of other weights (or by another version); "
                "give --force to start anew, or choose another folder."
            )
        stream.truncate(size)  # a line that was cut short
        journal = Journal(stream, lines[1:])
        if not lines:
            clear()
            journal.append(head)
        yield journal


def discard_journal(file: Path) -> None:
    """Remove a journal, if there is one.

    Raises:
        FormatError: another process has it open.
    """
    try:
        with file.open("rb+") as stream:
            _lock(file, stream)
            file.unlink()
    except FileNotFoundError:
        return


def _lock(file: Path, stream: IO[Any]) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:  # locked by a run, or removed by one that ended just now
        raise FormatError(
            f"{file.parent}: another process is at work in this folder; wait for it, or choose another."
        )


def _read(stream: TextIO) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines and how many bytes they take."""
    stream.seek(0)
    lines, size = [], 0
    for line in stream:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith("\n"):
            lines.pop()
            break
        size += len(line.encode())
    return lines, size
