"""Sizes as people write them."""

import re

from vllm_dfloat.errors import UnsupportedError

UNITS = {
    "B": 1,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
EXPECTED = "GiB or MiB (2**30 or 2**20 bytes; nvidia-smi shows MiB), GB or G (10**9 bytes), or B"
MIB, GIB = 1 << 20, 1 << 30
MAX_SIZE = 1 << 60


def parse_size(text: str, where: str) -> int:
    """Return the bytes that `text` says: "80GiB" is 80 * 2**30; "80GB" and "80G" are 80 * 10**9, in any case.

    A bare number is refused, since people mean GiB, GB, MiB or bytes by it; only 0 needs no unit.

    Raises:
        UnsupportedError: anything else; `where` says what it was given for.
    """
    match = _SIZE.fullmatch(text)
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "?")
    if match and not unit and number:
        raise UnsupportedError(
            f"{where} {text}: no unit; expected {EXPECTED}. If GiB is meant: {where} {match[1]}GiB."
        )
    if unit and unit not in UNITS:
        raise UnsupportedError(
            f"{where} {text}: not a size; expected a number and {EXPECTED}, such as 80GiB."
        )
    size = number * UNITS.get(unit, 1)
    if size >= MAX_SIZE:
        raise UnsupportedError(
            f"{where} {text}: no computer has as much; expected less than 2**60 bytes."
        )
    return int(size)


def show_size(num_bytes: float) -> str:
    """Return bytes in GiB with two decimals, in MiB where fewer than two digits would be left, or as they are."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if abs(num_bytes) >= unit / 10:
            return f"{num_bytes / unit:,.2f} {name}"
    return f"{num_bytes:,.0f} B"


def show_count(count: int) -> str:
    """Return a number of parameters in billions, or millions where that says more."""
    return f"{count / 1e9:,.3f} billion" if count >= 10**8 else f"{count / 1e6:,.3f} million"
