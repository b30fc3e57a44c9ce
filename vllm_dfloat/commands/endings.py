"""How a command ends if it fails: one line on stderr, whatever went wrong."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys

from vllm_dfloat.errors import DFloatError, one_line

_PLACES = ("source", "target", "path", "against", "out", "model")  # arguments that name files


def sentence(error: BaseException, args: argparse.Namespace | None) -> str:
    """Return one line that says what is wrong.

    Args:
        error: what ended the command.
        args: its arguments, None if they could not be parsed.
    """
    if isinstance(error, DFloatError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{_place(error, args)}{error.strerror}.")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted."
    if isinstance(error, ImportError) and (package := _package(error)):
        return _not_imported(package, error)
    if isinstance(error, RuntimeError) and "no locator available" in str(error):
        return (
            "numba finds no folder that it may write compiled code to. Set NUMBA_CACHE_DIR to one."
        )
    if isinstance(error, MemoryError):
        return "out of memory. Free some, or use a machine that has more."
    # The status is not Python's 1, which means that two checkpoints differ.
    what = f"{type(error).__name__}: {error}"
    return one_line(
        f"internal error, {what}. Run the same with --debug, and report what it prints."
    )


def _place(error: OSError, args: argparse.Namespace | None) -> str:
    """Return "path: " with the path in the error, or else the paths that the command was given."""
    named = [n for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
    if named:
        return " -> ".join(map(os.fsdecode, named)) + ": "
    places = [str(place) for name in _PLACES if (place := getattr(args, name, None))]
    return f"{', '.join(places)}: " if places else ""


def _package(error: ImportError) -> str:
    """Return the package that cannot be imported, "" if it is this one."""
    name, frames = error.name, error.__traceback__
    while not name and frames:  # raised by hand, in the package of the last frame
        if frames.tb_next is None:
            name = frames.tb_frame.f_globals.get("__name__")
        frames = frames.tb_next
    package = (name or "").partition(".")[0]
    return "" if package in ("", "__main__", "vllm_dfloat") else package


def _not_imported(package: str, error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{package} is not installed for {sys.executable}. Install it: pip install {package}"
    return one_line(
        f"{package} cannot be imported: {error}. Install it again: pip install --force-reinstall {package}"
    )


def is_unread() -> bool:
    """Return whether stdout is a pipe without a reader; a BrokenPipeError may also come from another pipe."""
    try:
        waiting = select.poll()
        waiting.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in waiting.poll(0))
    except (OSError, ValueError):
        return False


def open_closed_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null where the caller closed them, as some daemons do.

    Python has no stream then, and the next file that is opened, such as one with weights, would have the stream's
    number, to which libraries and children write.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def settle_stdout() -> None:
    """Redirect an unwritable stdout to /dev/null, so that exit keeps our status."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
