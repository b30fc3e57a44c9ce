"""What a command says while it works: a progress bar on stderr."""

from __future__ import annotations

from typing import Any


class Bar:
    """A progress bar in bytes with rate and time left; nothing where stderr is no terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def start(self, total_bytes: int, done_bytes: int = 0) -> None:
        """Show the bar of a job of `total_bytes`, of which an earlier run has done `done_bytes`."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(
            total=total_bytes,
            initial=done_bytes,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            disable=self._quiet or None,  # None: by what stderr is
        )

    def advance(self, num_bytes: int) -> None:
        """Move the bar."""
        self._bar.update(num_bytes)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
