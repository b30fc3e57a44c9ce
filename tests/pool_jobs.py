"""Jobs for the processes of a pool, which import this module by its name. They could not import a test module."""

from collections.abc import Callable

from numba.core import event


def compile_twice(_report: Callable[[int], None] | None = None) -> None:
    """Say what numba says when it compiles two functions."""
    for _ in range(2):
        with event.trigger_event("numba:compile"):
            pass
