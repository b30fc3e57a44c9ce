"""Sizes in bytes as people write and read them."""

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
    """Return a size in bytes: "80GiB" is 80 * 2**30; "80GB" and "80G" are 80 * 10**9, in upper or lower case.

    A number without GiB, GB, MiB or B is refused, since people mean any of these; only 0 needs none.

    Raises:
        UnsupportedError: anything else; `where` names the option for the message.
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
    """Return a size in GiB with two decimals, or in MiB or bytes if it is less than a tenth of that."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if abs(num_bytes) >= unit / 10:
            return f"{num_bytes / unit:,.2f} {name}"
    return f"{num_bytes:,.0f} B"


def show_count(count: int) -> str:
    """Return a number of parameters in billions, or in millions if it is small."""
    return f"{count / 1e9:,.3f} billion" if count >= 10**8 else f"{count / 1e6:,.3f} million"
