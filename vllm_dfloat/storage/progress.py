"""How far a long job is, in bytes: those of BF16 that pass through several phases, or those of files."""

from __future__ import annotations

from collections.abc import Callable

PARTS = (
    16  # a byte is done in so many steps; the phases' shares of them follow their measured times
)
COUNT, ENCODE, SIGNS, COMPARE = 2, 4, 3, 7

Advance = Callable[[int], None]
Start = Callable[
    [int, int], None
]  # told the bytes of a job in all, and those that are done already


def ignore(amount: int) -> None:
    """Take no notice of progress."""


def no_start(total_bytes: int, done_bytes: int) -> None:
    """Take no notice of what a job will do."""


class Bytes:
    """Reports a job of a known number of bytes; whatever it does, all of them in the end, and no more."""

    def __init__(self, num_bytes: int, report: Advance) -> None:
        """
        Args:
            num_bytes: the size of the job.
            report: called with bytes.
        """
        self._left = num_bytes
        self._report = report

    def done(self, num_bytes: int) -> None:
        """Report bytes that were done."""
        num_bytes = min(num_bytes, self._left)
        self._left -= num_bytes
        self._report(num_bytes)

    def finish(self) -> None:
        """Report what is left."""
        self.done(self._left)


class Progress:
    """Reports a job of a known size; whatever its phases say, all of it in the end, and no more."""

    def __init__(self, num_bytes: int, report: Advance) -> None:
        """
        Args:
            num_bytes: the size of the job.
            report: called with sixteenths of bytes.
        """
        self._parts = Bytes(PARTS * num_bytes, report)

    def phase(self, share: int) -> Advance:
        """Return what is to be called with the number of weights that went through a phase."""
        return lambda weights: self._parts.done(2 * weights * share)

    def copied(self, num_bytes: int) -> None:
        """Report bytes for which there is nothing else to do."""
        self._parts.done(PARTS * num_bytes)

    def finish(self) -> None:
        """Report what is left."""
        self._parts.finish()


class WholeBytes:
    """Adds up sixteenths of bytes and passes the whole bytes on."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._parts = 0

    def __call__(self, amount: int) -> None:
        before = self._parts // PARTS
        self._parts += amount
        self._advance(self._parts // PARTS - before)
