"""The size of a matrix in each of the layouts in which compressed weights can be held."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_dfloat.codec.arrays import I64Array
from vllm_dfloat.codec.fast_layout import (
    MAX_ESCAPES,
    RAW_ENTRIES,
    TILE_WEIGHTS,
    FastLayout,
    half_base_of,
)
from vllm_dfloat.codec.layout import aligned
from vllm_dfloat.dfloat11.format import BLOCK_BYTES, BLOCK_GAP_BYTES
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.packed_size import DESC_BYTES, Packed, packed_size
from vllm_dfloat.plan.weights import Weight

LAYOUTS = ("packed", "fast", "dfloat11")
AUTO = "auto"  # fast for some layers, packed for the others
# Of trained matrices 0.02 to 0.04 % of the weights lie outside the best 16 exponents.
ASSUMED_ESCAPES = 0.0003
TABLES = 3  # assumed: of the official layout, per matrix; 1 KiB each


@dataclass(frozen=True)
class Codes:
    """What is known of the values of weights.

    Attributes:
        bits: (weight) -> bits per weight of its exponents' codes.
        escapes: (weight) -> share of its weights outside the best 16 exponents.
    """

    bits: Callable[[Weight], float]
    escapes: Callable[[Weight], float] = lambda weight: ASSUMED_ESCAPES


def size_of(layout: str, weight: Weight, rows: int, cols: int, codes: Codes) -> Packed:
    """Return the size of the part [rows, cols] of a weight that a rank holds.

    A matrix that the fast layout would not make small enough is packed.
    """
    packed = packed_size(rows, cols, codes.bits(weight))
    if layout == "fast" and packed.num_bytes > DESC_BYTES:
        return _fast(rows, cols, codes.escapes(weight)) or packed
    if layout == "dfloat11" and packed.num_bytes > DESC_BYTES:
        return _official(rows, cols, codes.bits(weight), packed)
    return packed


def _fast(rows: int, cols: int, escapes: float) -> Packed | None:
    """Return the size in the fast layout, None if the matrix is not held so."""
    empty = FastLayout(rows, cols, 0, 0)
    entries = round(escapes * rows * cols)
    if escapes > MAX_ESCAPES / TILE_WEIGHTS:
        entries = RAW_ENTRIES * empty.num_tiles  # as if they were evenly spread: every tile is raw
    held = replace(empty, num_entries=entries)
    if not held.is_small:
        return None
    of_packed = packed_size(rows, cols, 0)
    return Packed(held.num_bytes + DESC_BYTES, of_packed.scratch_bytes, False)


def _official(rows: int, cols: int, code_bits: float, packed: Packed) -> Packed:
    """Return the size in the official layout, as vllm_dfloat/device/unit_resident.py holds it."""
    stream = int(rows * cols * code_bits / 8)
    blocks = -(-stream // BLOCK_BYTES)
    held = (
        1024 * TABLES + aligned(8 * (blocks + 1)) + BLOCK_GAP_BYTES * blocks + aligned(rows * cols)
    )
    num_bytes = held + stream
    if num_bytes >= 2 * rows * cols:
        return packed_size(rows, cols, 8)  # as BF16
    return Packed(num_bytes + DESC_BYTES, packed.scratch_bytes, False)


def share_of_escapes(counts: I64Array) -> float:
    """Return the share of weights outside the best 16 exponents, from the counts of all exponents, int64 [256]."""
    halves = [int(count) for count in counts.reshape(128, 2).sum(1)]
    best = half_base_of(halves)
    return 1 - sum(halves[best : best + 8]) / max(1, sum(halves))


def check(layout: str, granularity: str) -> None:
    """Raise UnsupportedError for a combination that is refused when serving too."""
    if granularity == "block" and layout in ("dfloat11", "all"):
        raise UnsupportedError(
            f"--granularity block with --layout {layout}: weights in the official layout are not decoded in groups. "
            "Remove one of the two."
        )
