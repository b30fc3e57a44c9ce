"""Whether a file is still the one that was opened, with the same contents.

Only reading everything twice can prove that. This compares what the system says of a file, which shows that it was
replaced, rewritten, cut, touched or removed. It does not show a write that leaves the times as they are: through a
memory map whose page was dirty before, or within the same tick of the file system's clock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from vllm_dfloat.errors import ChangedError

_SECOND = 1_000_000_000
AGAIN = "Run the command again when nothing writes there any more."


@dataclass(frozen=True)
class FileIdentity:
    """What the system says of a file, times in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def difference(self, now: FileIdentity) -> str:
        """Return in words what has changed since; "" if it is the same file with the same content."""
        if self.size != now.size:
            return f"it has {now.size} bytes, {self.size} before"
        is_same = (self.device, self.inode) == (now.device, now.inode)
        if (self.mtime_ns, self.ctime_ns) == (now.mtime_ns, now.ctime_ns):
            # Some network file systems give a file another inode number later; times with fractions tell more.
            return "" if is_same or self.ctime_ns % _SECOND else "it is another file now"
        if not is_same:
            return "it is another file now"
        if self.mtime_ns != now.mtime_ns:
            return "it was written to, or touched"
        return "it was written to, or its attributes were changed"


def identity_of(file: Path) -> FileIdentity:
    """Return the identity of the file at a path.

    Raises:
        OSError: there is no such file, or it cannot be reached.
    """
    return FileIdentity.of(file.stat())


def require_same(file: Path, before: FileIdentity | None, descriptor: int | None = None) -> None:
    """Check that a file has not changed.

    Args:
        file: its path.
        before: its identity then; None if it is not known, and nothing is checked.
        descriptor: of the open file, to look at that instead of the path.

    Raises:
        ChangedError: it has changed.
    """
    if before is None:
        return
    try:
        now = FileIdentity.of(os.stat(file if descriptor is None else descriptor))
    except OSError as error:
        raise changed(file, _gone(error)) from error
    if what := before.difference(now):
        raise changed(file, what)


@contextmanager
def unchanged(files: Mapping[Path, FileIdentity | None]) -> Iterator[None]:
    """Check at the end of the `with` block that no file has changed. A change also explains any error in the block.

    Raises:
        ChangedError: one has changed.
    """

    def check() -> None:
        for file, before in files.items():
            require_same(file, before)

    try:
        yield
    except Exception:
        check()
        raise
    check()


def open_same(file: Path, before: FileIdentity | None) -> BinaryIO:
    """Open a file that has not changed, unbuffered.

    Raises:
        ChangedError: it has changed.
        OSError: it cannot be opened.
    """
    try:
        stream = file.open("rb", buffering=0)
    except FileNotFoundError:
        require_same(file, before)
        raise
    try:
        require_same(file, before, stream.fileno())
    except BaseException:
        stream.close()
        raise
    return cast(BinaryIO, stream)


def changed(file: Path, what: str, advice: str = AGAIN) -> ChangedError:
    """Return the error for a file that has changed."""
    return ChangedError(
        f"{file}: was changed after it was opened: {what}; expected the same until the end. {advice}"
    )


def _gone(error: OSError) -> str:
    is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return "it was removed" if is_missing else f"it cannot be reached: {error.strerror}"


@dataclass(frozen=True)
class Snapshot:
    """The files of a folder as they were at one time.

    Attributes:
        folder: the folder.
        files: path below it -> identity.
    """

    folder: Path
    files: Mapping[str, FileIdentity]

    @classmethod
    def take(cls, folder: Path, names: Iterable[str]) -> Snapshot:
        """Return the identities of those of these files that are there."""
        found = {}
        for name in names:
            try:
                found[name] = identity_of(folder / name)
            except OSError:
                continue  # whoever reads it will say what is wrong
        return cls(folder, found)

    def difference(self, names: Iterable[str]) -> tuple[str, str] | None:
        """Return the first file that has changed and how, in words, or None.

        Args:
            names: the files that there should be now.
        """
        now = Snapshot.take(self.folder, {*names, *self.files})
        for name, before in self.files.items():
            if name not in now.files:
                return name, "it was removed"
            if what := before.difference(now.files[name]):
                return name, what
        new = sorted(now.files.keys() - self.files.keys())
        return (new[0], "it was not there before") if new else None
