"""How a matrix is cut into slabs: runs of its rows that are decoded and multiplied one after the other.

All slabs but the last have the same number of rows, so that no small one is left over, for which a GEMM would take
another algorithm. Each begins a tile, and a multiple of 128 rows: then every slab of a bias is aligned to 256 bytes.
"""

from collections.abc import Iterator
from math import gcd, lcm

from vllm_dfloat.codec.layout import TILE_WEIGHTS

ROWS_TOGETHER = 128


def slab_rows(rows: int, cols: int, num_bytes: int) -> int:
    """Return the rows of each slab of a BF16 matrix [rows, cols], for slabs of at most `num_bytes`.

    A slab has no less than the rows that must stay together, and no more than the matrix.
    """
    together = lcm(ROWS_TOGETHER, TILE_WEIGHTS // gcd(cols, TILE_WEIGHTS))
    most = max(together, num_bytes // (2 * cols) // together * together)
    number = -(-rows // most)
    return min(rows, -(-rows // (number * together)) * together)


def spans(rows: int, slab: int) -> Iterator[tuple[int, int]]:
    """Yield for each slab of `slab` rows its first row, and the row after its last one."""
    for first in range(0, rows, slab):
        yield first, min(rows, first + slab)
