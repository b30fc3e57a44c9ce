"""How far a long job is, in bytes: of BF16 weights that pass through several phases, or of files."""

from __future__ import annotations

from collections.abc import Callable

PARTS = 16  # steps in which a byte is done, shared among the phases by their measured times
COUNT, ENCODE, SIGNS, COMPARE = 2, 4, 3, 7

Advance = Callable[[int], None]
Start = Callable[[int, int], None]  # called with the bytes of a job, and with those done already


def ignore(amount: int) -> None:
    """Ignore progress."""


def no_start(total_bytes: int, done_bytes: int) -> None:
    """Ignore the size of a job."""


class Bytes:
    """Reports a job of a known number of bytes: in the end exactly that number, whatever was reported before."""

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
    """Reports a job of a known size: in the end exactly that size, whatever its phases reported."""

    def __init__(self, num_bytes: int, report: Advance) -> None:
        """
        Args:
            num_bytes: the size of the job.
            report: called with sixteenths of bytes.
        """
        self._parts = Bytes(PARTS * num_bytes, report)

    def phase(self, share: int) -> Advance:
        """Return a function to be called with the number of weights that went through a phase."""
        return lambda weights: self._parts.done(2 * weights * share)

    def copied(self, num_bytes: int) -> None:
        """Report bytes that are only copied."""
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
