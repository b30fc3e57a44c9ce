"""Read a JSON file, whatever is there: nothing, a huge file, a million nested lists, or no file but a pipe."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.lfs import refuse_pointer

MAX_CONFIG_BYTES = 16 << 20  # of a JSON file that describes a model
MAX_LIST_BYTES = 256 << 20  # of one that lists files or tensors
_PIECE_BYTES = 1 << 20
_ADVICE = "Correct it, or fetch it again."


def regular_size(file: Path) -> int:
    """Return the size of a regular file, or of the one that a link leads to, in bytes.

    Raises:
        FormatError: it is missing, a directory, or a pipe or device, whose reading might never end.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read: {_reason(error)}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{file}: is a directory, pipe or device; a file is expected.")
    return status.st_size


def read_object(file: Path, limit: int) -> dict[str, Any] | None:
    """Return the JSON object in `file`, None if there is no such file.

    Args:
        limit: the largest size in bytes that is read.

    Raises:
        FormatError: it cannot be read, is larger, or holds something else; or it is a link to nothing.
    """
    content = read_json(file, limit)
    if content is not None and not isinstance(content, dict):
        raise FormatError(f"{file}: holds a {type(content).__name__}, not an object. {_ADVICE}")
    return content


def read_json(file: Path, limit: int) -> Any:
    """Return what JSON `file` holds, None if there is no such file; arguments and errors as of `read_object`.

    A file that holds null holds something else.
    """
    if not os.path.lexists(file):
        return None
    size = regular_size(file)
    if size > limit:
        raise FormatError(f"{file}: has {size} bytes; {limit} is the limit. {_ADVICE}")
    refuse_pointer(file)
    try:
        with file.open("rb") as stream:
            content = json.loads(read_text(stream, size, file))
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {_reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: is not valid JSON: {error}. {_ADVICE}") from error
    if content is None:
        raise FormatError(f"{file}: holds a NoneType, not an object. {_ADVICE}")
    return content


def read_text(stream: BinaryIO, length: int, file: Path) -> bytes:
    """Return the next `length` bytes of a file, or all that is left of it; they should be JSON in UTF-8.

    Raises:
        FormatError: there is a zero byte among them. Reading stops there: a hole in a file takes no room on the disk,
            and must take none in memory.
    """
    pieces = []
    while length > 0 and (piece := stream.read(min(length, _PIECE_BYTES))):
        if b"\0" in piece:
            raise FormatError(
                f"{file}: holds a zero byte where JSON in UTF-8 is expected. It is damaged; fetch it again."
            )
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _reason(error: Exception) -> str:
    """Return what went wrong, without the path: the message names it already."""
    return str(getattr(error, "strerror", None) or error)
