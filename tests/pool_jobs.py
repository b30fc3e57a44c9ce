"""Jobs for the processes of a pool, which import this module by name; they cannot import a test module."""

from collections.abc import Callable

from numba.core import event


def compile_twice(_report: Callable[[int], None] | None = None) -> None:
    """Report twice what numba's compiler reports for a function."""
    for _ in range(2):
        with event.trigger_event("numba:compile"):
            pass
