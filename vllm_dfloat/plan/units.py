"""Sizes as people write them."""

import re

from vllm_dfloat.errors import UnsupportedError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
GIB = 1 << 30
MAX_SIZE = 1 << 60


def parse_size(text: str, where: str) -> int:
    """Return the bytes that `text` says: "80GiB" is 80 * 2**30, "80GB" 80 * 10**9, a bare number bytes.

    Raises:
        UnsupportedError: anything else; `where` says what it was given for.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        raise UnsupportedError(
            f"{where} {text}: not a size; expected a number and GiB (2**30 bytes) or GB (10**9 bytes), "
            "such as 80GiB."
        )
    size = float(match[1]) * UNITS[match[2].upper()]
    if size >= MAX_SIZE:
        raise UnsupportedError(
            f"{where} {text}: no computer has as much; expected less than 2**60 bytes."
        )
    return int(size)


def gib(num_bytes: float) -> str:
    """Return bytes in GiB with two decimals."""
    return f"{num_bytes / GIB:,.2f} GiB"
