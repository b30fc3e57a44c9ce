"""Decode DFloat11 units on the CPU, whole or a range of weights at a time.

Only the blocks that hold the wanted weights are decoded, by several threads.
Equal bit for bit to reference.decode.
"""

from __future__ import annotations

import numpy as np

from vllm_dfloat.codec.arrays import I64Array, U16Array
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.dfloat11.decode_loops import decode_blocks, load_gap, wide_table
from vllm_dfloat.dfloat11.format import BLOCK_WINDOWS, STATUS_COUNT, STATUS_GAP
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import FormatError


def decode_unit(unit: Unit, start: int = 0, stop: int | None = None) -> U16Array:
    """Return weights start..stop of the unit (stop excluded, default all) as BF16 bits.

    Raises:
        FormatError: the codes contradict the unit's gaps, positions or tables.
    """
    stop = unit.num_weights if stop is None else stop
    if not 0 <= start <= stop <= unit.num_weights:
        raise ValueError(f"{unit.where}: weights {start}..{stop} of {unit.num_weights}")
    out = np.empty(stop - start, np.uint16)
    if start == stop:
        return out
    first, last = unit.blocks_of(start, stop)
    status = np.zeros((last - first, 3), np.int64)
    over_tiles(
        decode_blocks, last - first, first, unit.stream, unit.sign_mantissa, unit.gaps,
        unit.positions, unit.tables, wide_table(unit.tables), start, out, status,
    )  # fmt: skip
    _check_status(unit, first, status)
    return out


def decode_range(unit: Unit, start: int, stop: int) -> U16Array:
    """Do as `decode_unit` for a unit that may stay in its file (`UnitEntry.open`): reads only the blocks it needs."""
    if not 0 <= start < stop <= unit.num_weights:
        raise ValueError(f"{unit.where}: weights {start}..{stop} of {unit.num_weights}")
    first, last = unit.blocks_of(start, stop)
    base = int(unit.positions[first])
    return decode_unit(unit.piece(first, last), start - base, stop - base)


def _check_status(unit: Unit, first: int, status: I64Array) -> None:
    bad = np.flatnonzero(status[:, 0])
    if bad.size == 0:
        return
    block = first + int(bad[0])
    kind, window, found = status[bad[0]].tolist()
    expected = load_gap(unit.gaps, window + 1) if kind == STATUS_GAP else 0
    window, stored_block = window + BLOCK_WINDOWS * unit.first_block, block + unit.first_block
    where = f"{unit.where}.encoded_exponent: window {window}"
    if kind == STATUS_GAP:
        what = f"{where}: the next window starts at its bit {found}; gaps says bit {expected}"
    elif kind == STATUS_COUNT:
        expected = unit.positions[block + 1] - unit.positions[block]
        what = f"{where}: {found} codes so far in block {stored_block}; output_positions says {expected}"
    else:
        what = f"{where}: after {found} codes of block {stored_block} come bits that are no code; a code "
        what += f"of the {unit.num_weights} within {len(unit.stream)} bytes is expected"
    raise FormatError(
        f"{what}. The file is truncated or was changed after encoding; fetch it again."
    )
