"""How far a long job is, in bytes of BF16, each of which passes through several phases."""

from __future__ import annotations

from collections.abc import Callable

PARTS = (
    16  # a byte is done in so many steps; the phases' shares of them follow their measured times
)
COUNT, ENCODE, SIGNS, COMPARE = 2, 4, 3, 7

Advance = Callable[[int], None]


def ignore(amount: int) -> None:
    """Take no notice of progress."""


class Progress:
    """Reports a job of a known size; whatever its phases say, all of it in the end, and no more."""

    def __init__(self, num_bytes: int, report: Advance) -> None:
        """
        Args:
            num_bytes: the size of the job.
            report: called with sixteenths of bytes.
        """
        self._left = PARTS * num_bytes
        self._report = report

    def phase(self, share: int) -> Advance:
        """Return what is to be called with the number of weights that went through a phase."""
        return lambda weights: self._take(2 * weights * share)

    def copied(self, num_bytes: int) -> None:
        """Report bytes for which there is nothing else to do."""
        self._take(PARTS * num_bytes)

    def finish(self) -> None:
        """Report what is left."""
        self._take(self._left)

    def _take(self, amount: int) -> None:
        amount = min(amount, self._left)
        self._left -= amount
        self._report(amount)


class WholeBytes:
    """Adds up sixteenths of bytes and passes the whole bytes on."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._parts = 0

    def __call__(self, amount: int) -> None:
        before = self._parts // PARTS
        self._parts += amount
        self._advance(self._parts // PARTS - before)
