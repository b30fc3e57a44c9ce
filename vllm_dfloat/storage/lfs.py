"""Git LFS pointers: what a clone without Git LFS holds in place of its large files."""

import stat
from pathlib import Path

from vllm_dfloat.errors import FormatError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 1024  # a larger file is no pointer for Git LFS either


def is_pointer(file: Path) -> bool:
    """Return whether a file is a Git LFS pointer; False if it cannot be read: whoever reads it says why."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            return False
        with file.open("rb") as stream:
            return stream.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False


def refuse_pointer(file: Path) -> None:
    """Refuse a file that is a pointer.

    Raises:
        FormatError: it is one.
    """
    if is_pointer(file):
        raise FormatError(
            f"{file}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in {file.parent}, or fetch the "
            "model again."
        )
