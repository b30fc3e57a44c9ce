"""Which product with the fast layout is launched, and how: the tables of kernels/configs.py."""

import pytest

from vllm_dfloat.device import fast_ops
from vllm_dfloat.kernels import fast_matmul as kernels
from vllm_dfloat.kernels.configs import CONFIGS, INTERPRETED, config_for
from vllm_dfloat.kernels.fast_product import TALL_BANDS, Choice, DotShape, FastProduct, GemvShape


@pytest.mark.parametrize(
    ("rows", "cols", "parts"),
    [
        (28_672, 4096, {1: 1, 16: 1, 64: 1}),
        (6144, 4096, {1: 1, 16: 4, 64: 4}),
        (4096, 14_336, {1: 2, 16: 8, 64: 4}),
        (4096, 4096, {1: 2, 16: 8, 64: 4}),
        (64, 128, {1: 1, 16: 1, 64: 1}),  # a part has columns
        (64, 640, {1: 2, 16: 4, 64: 4}),
    ],
)
def test_columns_are_cut_in_the_parts_that_were_best_on_an_h100(
    rows: int, cols: int, parts: dict[int, int]
) -> None:
    config = config_for("NVIDIA H100 80GB HBM3", (9, 0)).fast_product
    for num_x, expected in parts.items():
        shape = config.launch_shape(rows, cols, num_x)
        assert isinstance(shape, GemvShape) == (num_x <= kernels.MAX_GEMV_ROWS)
        assert shape.parts == expected


TABLES = dict.fromkeys(
    (FastProduct(), INTERPRETED.fast_product, *(c.fast_product for c in CONFIGS.values()))
)


@pytest.mark.parametrize("product", TABLES)
@pytest.mark.parametrize("rows", [1, 64, 4096, 28_672])
def test_every_table_launches_any_matrix_within_the_scratch_of_its_layer(
    rows: int, product: FastProduct
) -> None:
    for cols in (*range(128, 2048, 128), 4096, 14_336):
        for num_x in range(1, product.max_rows(rows) + 1):
            shape = product.launch_shape(rows, cols, num_x)
            room = fast_ops.scratch_numel(rows, cols) // 2  # FP32 numbers
            assert kernels.num_partials(rows, num_x, shape) <= room


@pytest.mark.parametrize("product", TABLES)
def test_what_a_table_chooses_can_be_compiled(product: FastProduct) -> None:
    for choice in product.choices:
        shape = choice.shape
        assert choice.up_to <= kernels.max_rows(shape)
        assert shape.parts == 1
        if isinstance(shape, GemvShape):
            assert 64 % (shape.turns * shape.warps) == 0
            assert shape.groups % 32 == 0
        else:
            assert shape.rows % (16 * shape.warps) == 0
            of_group = shape.warps >= 4 and product not in OF_WARPS and not shape.has_bands
            assert shape.width == (2 if of_group else 4)
            assert shape.cols in (128, 256)
            is_alone = shape.has_bands or (shape.warps == 1 and choice.up_to <= 32)
            assert 2 <= shape.stages <= 6 or is_alone


OF_WARPS = {
    config_for("", (8, minor)).fast_product for minor in (0, 9)
}  # no tensor cores of a warp group


def test_the_first_line_that_fits_is_chosen_and_beyond_the_last_nothing() -> None:
    small, large = DotShape(), DotShape(rows=32, warps=2, width=4)
    product = FastProduct((Choice(8, large, 1, from_rows=1000), Choice(32, small, 1)))
    assert product.launch_shape(1000, 128, 8) == large
    assert product.launch_shape(999, 128, 8) == product.launch_shape(1000, 128, 9) == small
    assert product.max_rows(1000) == 32
    assert FastProduct((Choice(8, large, 1, from_rows=1000),)).max_rows(999) == 0
    with pytest.raises(ValueError, match="33 rows of activations, a matrix of 1000 rows"):
        product.launch_shape(1000, 128, 33)


def test_an_h200_decodes_for_as_many_rows_as_that_is_no_slower() -> None:
    h100, h200 = (
        config_for(name, (9, 0)).fast_product for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    )
    assert (h100.max_rows(4096), h200.max_rows(4096), h200.max_rows(28_672)) == (64, 32, 32)
    eight = h200.launch_shape(28_672, 4096, 8)
    assert eight == DotShape(rows=32, warps=2, width=4) == h100.launch_shape(28_672, 4096, 5)
    assert h200.launch_shape(28_672, 4096, 16) == DotShape(rows=32, warps=1, width=4)
    assert h200.launch_shape(28_672, 4096, 1).parts == 2
    assert h200.launch_shape(28_672, 4096, 2).parts == 1
    assert INTERPRETED.fast_product.max_rows(1) == kernels.MAX_ROWS


def test_sums_of_parts_of_many_rows_fit_in_the_room_of_the_weights() -> None:
    table = FastProduct((Choice(256, TALL_BANDS, programs=10_000),))
    parts = [table.launch_shape(128, 4096, num_x).parts for num_x in (64, 128, 129, 256)]
    assert parts == [8, 8, 8, 8]
    parts = [table.launch_shape(128, 1024, num_x).parts for num_x in (64, 128, 129, 256)]
    assert parts == [8, 4, 2, 2]
    assert table.launch_shape(128, 256, 256).parts == 1


def test_more_programs_for_more_rows_of_activations_count_as_such() -> None:
    table = FastProduct((Choice(256, TALL_BANDS, programs=100),))
    assert [table.launch_shape(4096, 8192, num_x).parts for num_x in (64, 65, 256)] == [4, 2, 1]
