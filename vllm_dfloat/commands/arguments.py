"""Types of arguments that several commands take."""

import argparse
from pathlib import Path


def place(text: str) -> str:
    """Return a path, or the id of a model; an empty one, as an unset variable gives it, would be the current folder.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; expected a path, with . for the current folder")
    return text


def path(text: str) -> Path:
    """Return a path; raises as `place` does."""
    return Path(place(text))
