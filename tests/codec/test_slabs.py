"""How a matrix is cut into slabs."""

import pytest

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.codec.slabs import ROWS_TOGETHER, slab_rows, spans

HEADS = [
    (128_256, 4096), (262_208, 5376), (64_128, 8192), (151_936, 896), (4096, 64), (300, 2048), (1000, 7)
]  # fmt: skip


@pytest.mark.parametrize("num_bytes", [1, 1 << 20, 16 << 20, 64 << 20, 235 << 20, 1 << 40])
@pytest.mark.parametrize(("rows", "cols"), HEADS)
def test_slabs_begin_tiles_cover_the_rows_and_keep_to_their_bytes(
    rows: int, cols: int, num_bytes: int
) -> None:
    slab = slab_rows(rows, cols, num_bytes)
    found = list(spans(rows, slab))
    assert [end for _, end in found[:-1]] == [first for first, _ in found[1:]]
    assert found[0][0] == 0
    assert found[-1][1] == rows
    assert all(first * cols % TILE_WEIGHTS == 0 for first, _ in found)
    assert all(first % ROWS_TOGETHER == 0 for first, _ in found)
    one_more = slab_rows(rows, cols, 1)  # the rows that must stay together
    assert 2 * slab * cols <= max(num_bytes, 2 * one_more * cols)


def test_slabs_are_about_equal() -> None:
    # Bug caught: a last slab of few rows, for which a GEMM takes another algorithm.
    slab = slab_rows(128_256, 4096, 224 << 20)
    assert [end - first for first, end in spans(128_256, slab)] == [25_728] * 4 + [25_344]
