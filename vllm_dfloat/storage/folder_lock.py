"""A lock on a folder that is being made, so that one run at a time works in it.

The folder itself is locked: no file is left over, and deleting what is in the folder cannot break the lock. The system
releases it when the last process that holds it has ended, however that ended. Processes that get a `FolderLock` as an
argument hold it too, since they may live a moment longer than the process that started them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from vllm_dfloat.errors import FormatError

PATIENCE = 3.0  # seconds; the processes of a run that was killed end within one
_SECONDS_BETWEEN_TRIES = 0.05


class FolderLock:
    """A folder in which no other run works while this is open."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def check(self) -> None:
        """Check that the path still leads to the locked folder.

        Raises:
            FormatError: it was moved, removed or replaced; another run may be at work there.
        """
        if not _is_same(self.path, self._descriptor):
            raise FormatError(
                f"{self.path}: the folder was moved, removed or replaced while files were written into it. "
                "Run the same command again."
            )

    def __reduce__(self) -> tuple[object, ...]:
        # Works only while a process is being started; a spawned process gets no other descriptors.
        return _received, (self.path, reduction.DupFd(self._descriptor))


def _received(path: Path, duplicate: Any) -> FolderLock:
    return FolderLock(path, duplicate.detach())


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Make `folder` if it does not exist, and lock it.

    Raises:
        FormatError: another run holds it.
    """
    descriptor = _lock(folder)
    try:
        yield FolderLock(folder, descriptor)
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Return a descriptor of the folder, locked."""
    end = time.monotonic() + PATIENCE
    while True:
        _make(folder)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # somebody removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(folder, descriptor):  # else somebody removed it before it was locked
                return descriptor
        except BlockingIOError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise FormatError(
                f"{folder}: cannot be locked: {error.strerror}; expected a file system with locks, which keep two runs "
                "apart. Choose a folder on another one."
            ) from error
        os.close(descriptor)
        if time.monotonic() > end:
            raise FormatError(
                f"{folder}: another process is at work in this folder; wait for it, or choose another."
            )
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the caller says what to do
        raise FormatError(
            f"{folder}: cannot be made: {error.strerror}; expected a place where this user may make a folder. "
            "Choose another."
        ) from error


def _is_same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False
