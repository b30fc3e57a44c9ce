"""Turn the `luts` of a DFloat11 unit into decode tables in which every entry can be trusted.

The official encoder leaves meaningless values, pointers too, in the entries of its end marker, so `luts`
cannot be followed blindly. Only entries that can be a code are kept: a code of length L fills an
aligned run of entries in a table at depth (L - 1) // 8. A copy of such a run is kept as well: either
it belongs to the end marker, or it is the code itself after filler of the same value (some encoders fill
with 0). The codes of a valid file lead only to the real one.
"""

from __future__ import annotations

import numpy as np

from vllm_dfloat.codec.arrays import I32Array, U8Array
from vllm_dfloat.dfloat11.format import (
    FIRST_POINTER,
    LENGTH_SHIFT,
    MAX_CODE_BITS,
    MAX_DEPTH,
    POINTER,
)
from vllm_dfloat.errors import FormatError

_ADVICE = "The file was changed after encoding; fetch it again."


def build_tables(luts: U8Array, where: str) -> I32Array:
    """Return decode tables int32 [R - 1, 256] for checked `luts` uint8 [R, 256].

    Entries that cannot be a code become 0: a stream that leads to one is an error, never a wrong weight.

    Raises:
        FormatError: `luts` is not a code book of this format.
    """
    check_luts(luts, where)
    lengths = luts[-1].tolist()
    rows = luts[:-1].tolist()
    tables = np.zeros((len(rows), 256), np.int32)
    depth = {0: 0}
    placed: set[int] = set()
    queue = [0]
    for row in queue:  # grows while it is walked: parents come before children
        for entry, value in enumerate(rows[row]):
            if value >= FIRST_POINTER:
                child = 256 - value
                # A second pointer to a table, or one at the last level, is a stale entry.
                if child not in depth and depth[row] < MAX_DEPTH:
                    depth[child] = depth[row] + 1
                    queue.append(child)
                    tables[row, entry] = POINTER | child
            elif (lengths[value] + 7) // 8 == depth[row] + 1:
                span = 1 << (8 * (depth[row] + 1) - lengths[value])
                if entry % span == 0 and rows[row][entry : entry + span] == [value] * span:
                    placed.add(value)
                    tables[row, entry : entry + span] = value | lengths[value] << LENGTH_SHIFT
    missing = [symbol for symbol in range(256) if lengths[symbol] and symbol not in placed]
    if missing:
        raise FormatError(
            f"{where}: exponent {missing[0]} has a code of {lengths[missing[0]]} bits, but no "
            f"table holds that code. {_ADVICE}"
        )
    return tables


def check_luts(luts: U8Array, where: str) -> None:
    """Refuse code lengths and pointers that the format cannot have."""
    num_rows = len(luts)
    lengths = luts[-1]
    used = np.flatnonzero(lengths)
    if used.size == 0:
        raise FormatError(
            f"{where}: the last row has no code length; at least one is expected. {_ADVICE}"
        )
    if used[-1] >= FIRST_POINTER:
        raise FormatError(
            f"{where}: exponent {used[-1]} has a code of {lengths[used[-1]]} bits; exponents from "
            f"{FIRST_POINTER} on (values of 2**113 and more, Inf, NaN) must have none, because "
            "their entries mean pointers. This weight cannot be decoded; take the original BF16 file."
        )
    longest = int(np.argmax(lengths))
    if lengths[longest] > MAX_CODE_BITS:
        raise FormatError(
            f"{where}: exponent {longest} has a code of {lengths[longest]} bits; "
            f"at most {MAX_CODE_BITS} are expected. {_ADVICE}"
        )
    children = 256 - luts[:-1].astype(np.int64)
    children = children[children <= 256 - FIRST_POINTER]
    if children.size and children.max() > num_rows - 2:
        raise FormatError(
            f"{where}: an entry refers to table {children.max()}; tables 1 to {num_rows - 2} are "
            f"expected with {num_rows} rows. {_ADVICE}"
        )
