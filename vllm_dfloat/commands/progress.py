"""What a command prints on stderr while it works: a progress bar, and that the first run compiles."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

COMPILING = (
    "vllm-dfloat: compiling the codec for this machine; takes some seconds, in the first run only"
)
tells_compiling = True  # tests set it to False: stderr must not depend on numba's cache


class Bar:
    """A progress bar in bytes with rate and time left; invisible if stderr is no terminal."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._open = ExitStack()

    def __enter__(self) -> Bar:
        from vllm_dfloat.codec.compiling import telling

        if tells_compiling and not self._quiet:
            self._open.enter_context(telling(_tell))
        return self

    def start(self, total_bytes: int, done_bytes: int = 0) -> None:
        """Show the bar of a job of `total_bytes`; an earlier run has done `done_bytes` of them."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = self._open.enter_context(
            tqdm(
                total=total_bytes,
                initial=done_bytes,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
                disable=self._quiet or None,  # None: by what stderr is
            )
        )

    def advance(self, num_bytes: int) -> None:
        """Move the bar."""
        self._bar.update(num_bytes)

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def _tell() -> None:
    from tqdm import tqdm

    tqdm.write(COMPILING, file=sys.stderr)  # above the bar, if there is one
