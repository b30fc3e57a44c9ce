"""Decode the packed layout on the CPU: the numba twin of kernels/packed_decode.py."""

import numpy as np

from vllm_dfloat.codec.arrays import I32Array, I64Array, U16Array
from vllm_dfloat.codec.decode_loops import (
    STATUS_OK,
    decode_chosen_rows,
    decode_chosen_tiles,
    decode_run,
    decode_tiles,
)
from vllm_dfloat.codec.layout import TILE_WEIGHTS, PackedTensor
from vllm_dfloat.codec.threads import over_tiles
from vllm_dfloat.errors import FormatError


def decode(packed: PackedTensor) -> U16Array:
    """Return the BF16 bits, uint16 [rows, cols], that `packed` was encoded from.

    Raises:
        FormatError: a tile's codes contradict its lane lengths.
    """
    lay = packed.layout
    out = np.empty(lay.padded_numel, np.uint16)
    status = np.empty(lay.num_tiles, np.int32)
    decode_into(packed, out, status)
    check_status(status, packed.name)
    return out[: lay.numel].reshape(lay.rows, lay.cols)


def decode_into(packed: PackedTensor, out: U16Array, status: I32Array) -> None:
    """Write all whole tiles of `packed` to `out` and a status word per tile to `status`.

    Args:
        packed: what `encode` made. Whatever its bytes say by now, no read leaves them.
        out: uint16 [>= layout.padded_numel].
        status: int32 [>= layout.num_tiles]; STATUS_OK or a sum of STATUS_* bits.
    """
    lay = packed.layout
    if packed.is_raw:
        out[: lay.padded_numel] = packed.payload.view(np.uint16)
        status[: lay.num_tiles] = STATUS_OK
        return
    over_tiles(
        decode_tiles, lay.num_tiles, packed.lut, packed.sign_mantissa, packed.lane_lengths,
        packed.tile_starts, packed.words, lay.code_bits,
        out.view(np.uint32), status,
    )  # fmt: skip


def decode_run_into(
    packed: PackedTensor, first: int, count: int, out: U16Array, status: I32Array
) -> None:
    """Write tiles `first` to `first + count - 1` of `packed` to the beginning of `out`, their status words likewise.

    Args:
        packed: as for `decode_into`.
        out: uint16 [>= count * TILE_WEIGHTS].
        status: int32 [>= count].
    """
    lay, numel = packed.layout, count * TILE_WEIGHTS
    if packed.is_raw:
        out[:numel] = packed.payload.view(np.uint16)[first * TILE_WEIGHTS :][:numel]
        status[:count] = STATUS_OK
        return
    over_tiles(
        decode_run, count, first, packed.lut, packed.sign_mantissa, packed.lane_lengths,
        packed.tile_starts, packed.words, lay.code_bits,
        out.view(np.uint32), status,
    )  # fmt: skip


def decode_tiles_into(
    packed: PackedTensor, tiles: I64Array, out: U16Array, status: I32Array
) -> None:
    """Write chosen tiles of `packed` to `out`, each in its place, and their status words; write nothing else.

    Args:
        packed, out, status: as for `decode_into`.
        tiles: int64 [n], numbers of tiles, each once.
    """
    lay = packed.layout
    if packed.is_raw:
        shape = lay.num_tiles, TILE_WEIGHTS
        source = packed.payload.view(np.uint16).reshape(shape)
        out[: lay.padded_numel].reshape(shape)[tiles] = source[tiles]
        status[tiles] = STATUS_OK
        return
    over_tiles(
        decode_chosen_tiles, tiles.size, tiles, packed.lut, packed.sign_mantissa,
        packed.lane_lengths, packed.tile_starts, packed.words, lay.code_bits,
        out.view(np.uint32), status,
    )  # fmt: skip


def decode_rows(packed: PackedTensor, rows: I64Array) -> U16Array:
    """Return the chosen rows, uint16 [len(rows), cols]; only the tiles they touch are decoded.

    Raises:
        IndexError: a row outside the matrix.
        FormatError: a touched tile's codes contradict its lane lengths.
    """
    lay = packed.layout
    if rows.size and not (rows.min() >= 0 and rows.max() < lay.rows):
        raise IndexError(
            f"{packed.name or 'packed tensor'}: rows {rows.min()} to {rows.max()} asked for; "
            f"the matrix has {lay.rows}"
        )
    out = np.empty((rows.size, lay.cols), np.uint16)
    if packed.is_raw:
        out[:] = packed.payload.view(np.uint16)[: lay.numel].reshape(lay.rows, lay.cols)[rows]
        return out
    status = np.zeros(rows.size, np.int32)
    decode_chosen_rows(
        rows, packed.lut, packed.sign_mantissa, packed.lane_lengths, packed.tile_starts,
        packed.words, lay.code_bits, lay.cols, out, status,
    )  # fmt: skip
    check_status(status, packed.name, "row")
    return out


def check_status(
    status: I32Array | I64Array,
    name: str,
    what: str = "tile",
    first: int = 0,
    advice: str = "The packed bytes were changed after encoding; load the model again.",
) -> None:
    """Raise FormatError if a decoder reported a contradiction.

    Args:
        status: a word per part that was decoded, 0 where all is well.
        name: what was decoded.
        what: what such a part is called.
        first: number of the first one.
        advice: what may have happened, and what to do.
    """
    wrong = np.flatnonzero(status)
    if wrong.size:
        raise FormatError(
            f"{name or 'packed tensor'}: {what} {first + wrong[0]} ended with status {status[wrong[0]]} "
            f"({wrong.size} of {status.size} did not end with 0). {advice}"
        )
