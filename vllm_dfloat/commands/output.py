"""Print the results of commands to standard output, which may be a full disk or a closed pipe."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dfloat.errors import escaped

STDOUT = "standard output"


def say(*lines: str) -> None:
    """Print lines of a result, unprintable characters escaped as in errors: paths and names cannot forge a line.

    Raises:
        OSError: standard output cannot be written; the error names it.
    """
    with _named():
        for line in lines:
            print(escaped(line))


def say_json(content: dict[str, Any]) -> None:
    """Print a result as one JSON object, which has its own escapes; raises as `say` does."""
    with _named():
        print(json.dumps(content, indent=1))


def not_sought_clause(reason: str) -> str:
    """Return the end of a line on a model whose tensors could not be checked for missing ones; "" without a reason."""
    return f"; whether tensors are missing was not checked: {reason}" if reason else ""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 file", "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def flush() -> None:
    """Write out all that was printed; raises as `say` does."""
    with _named():
        sys.stdout.flush()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise
