"""Read a JSON file that may be anything: absent, huge, nested a million times, or no file at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from vllm_dfloat.errors import FormatError


def regular_size(file: Path) -> int:
    """Return the size of a regular file, or of the one that a link leads to, in bytes.

    Raises:
        FormatError: it is missing, a directory, or a pipe or device, whose reading might never end.
    """
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        raise FormatError(f"{file.name}: cannot be read: {_reason(error)}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{file.name}: is a directory, pipe or device; a file is expected.")
    return status.st_size


def read_object(file: Path, limit: int) -> dict[str, Any] | None:
    """Return the JSON object in `file`, None if there is no such file.

    Args:
        limit: the largest size in bytes that is read.

    Raises:
        FormatError: it cannot be read, is larger, or holds something else. A link that leads nowhere is no absent file.
    """
    if not os.path.lexists(file):
        return None
    size = regular_size(file)
    if size > limit:
        raise FormatError(f"{file.name}: has {size} bytes; {limit} is the limit.")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise FormatError(f"{file.name}: cannot be read: {_reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.name}: is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file.name}: holds a {type(content).__name__}, not an object.")
    return content


def _reason(error: Exception) -> str:
    """Return what went wrong without the path, which the message begins with."""
    return str(getattr(error, "strerror", None) or error)
