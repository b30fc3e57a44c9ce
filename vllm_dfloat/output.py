"""Where commands print their results: standard output, which may be a full disk or a closed pipe."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = "standard output"


def say(text: str) -> None:
    """Print a result.

    Raises:
        OSError: standard output takes nothing; the error names it.
    """
    with _named():
        print(text)


def flush() -> None:
    """Let standard output take all that was printed; raises as `say` does."""
    with _named():
        sys.stdout.flush()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise
