"""How many bits per weight the fast layout takes, all metadata included, for weights as models have them."""

from collections.abc import Callable

import numpy as np
import pytest
from helpers import bf16_bits

from vllm_dfloat.codec.fast_encode import encode

ROWS, COLS = 4096, 4096
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def normal(rng: np.random.Generator) -> FloatArray:
    return rng.standard_normal((ROWS, COLS)) * 0.02


def outlier_columns(rng: np.random.Generator, times: int = 20) -> FloatArray:
    weight = normal(rng)
    weight[:, rng.permutation(COLS)[:40]] *= times
    return weight


def with_zero_rows(count: int, apart: int) -> Callable[[np.random.Generator], FloatArray]:
    def make(rng: np.random.Generator) -> FloatArray:
        weight = normal(rng)
        weight[: count * apart : apart] = 0
        return weight

    return make


def bits_per_weight(make: Callable[[np.random.Generator], FloatArray]) -> float:
    fast = encode(bf16_bits(make(np.random.default_rng(0))))
    assert fast is not None
    return fast.bits_per_weight


@pytest.mark.parametrize(
    "make",
    [
        normal,
        outlier_columns,
        lambda rng: rng.standard_t(3, (ROWS, COLS)) * 0.02,
        with_zero_rows(8, apart=512),
        with_zero_rows(3, apart=1),
    ],
    ids=["normal", "outlier columns", "student t", "8 zero rows", "3 zero rows of a tile"],
)
def test_weights_as_models_have_them_take_at_most_12_10_bits(
    make: Callable[[np.random.Generator], FloatArray],
) -> None:
    assert bits_per_weight(make) <= 12.10


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (with_zero_rows(64, apart=64), 12.0064 + 32 * 64 / ROWS),
        (with_zero_rows(5, apart=1), 12.0064 + 16 * 64 / ROWS),
        (with_zero_rows(64, apart=1), 12.0064 + 16 * 64 / ROWS),
    ],
    ids=["in tiles with others", "5 in a row of tiles, which are raw", "a whole row of tiles"],
)
def test_zeros_cost_what_the_document_says(
    make: Callable[[np.random.Generator], FloatArray], expected: float
) -> None:
    # Bug caught: a base that zeros pull away from the other weights.
    assert bits_per_weight(make) == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(("times", "expected"), [(20, 12.043), (100, 12.141)])
def test_columns_of_outliers_cost_what_the_document_says(times: int, expected: float) -> None:
    assert bits_per_weight(lambda rng: outlier_columns(rng, times)) == pytest.approx(
        expected, abs=0.001
    )
