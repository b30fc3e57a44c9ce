"""Tell the user when numba compiles: in the first run on a machine that takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

_tell: Callable[[], None] | None = None


@contextmanager
def telling(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` once if numba compiles anything in the `with` block that is not in its cache.

    It is called in the thread that compiles. The other processes of a pool pass the message on (worker_pool.py).
    """
    global _tell
    _tell = tell
    try:
        with event.install_listener("numba:compile", _Listener()):
            yield
    finally:
        _tell = None


def told() -> None:
    """Pass on that numba compiles, here or in another process."""
    global _tell
    tell, _tell = _tell, None
    if tell:
        tell()


class _Listener(event.Listener):  # type: ignore[misc]  # numba ships no types
    def on_start(self, _: Any) -> None:
        told()

    def on_end(self, _: Any) -> None:
        pass
