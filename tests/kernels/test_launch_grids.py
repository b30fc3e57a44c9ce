"""The number of programs of a launch: CUDA takes 2**31 - 1 along the first axis of a grid, and 65,535 along others.

Kernels that only record the grid are launched on meta tensors, which have a shape and no memory.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_dfloat.kernels import (
    dfloat11_decode,
    dfloat11_encode,
    dfloat11_resident,
    encode_count,
    expert_decode,
    expert_marks,
    fast_decode,
    fast_experts,
    fast_group,
    fast_rows,
    group_decode,
    packed_decode,
    packed_encode,
    packed_matmul,
    packed_rows,
)

LIMITS = (2**31 - 1, 65_535, 65_535)
MODULES = (
    packed_decode,
    group_decode,
    expert_decode,
    expert_marks,
    dfloat11_decode,
    dfloat11_resident,
    packed_rows,
    packed_encode,
    encode_count,
    dfloat11_encode,
    packed_matmul,
    fast_decode,
    fast_experts,
    fast_group,
    fast_rows,
)


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def desc() -> torch.Tensor:
    return meta(torch.int64, 4)


def bf16(*shape: int) -> torch.Tensor:
    return meta(torch.bfloat16, *shape)


def words(*shape: int) -> torch.Tensor:
    return meta(torch.int32, *shape)


def multiply(num_x: int, rows: int, cols: int) -> None:
    partials = meta(torch.float32, 1)
    packed_matmul.matmul(
        bf16(num_x, cols), desc(), None, cols, bf16(num_x, rows), partials, words(1)
    )


def decode_unit(num_bytes: int) -> None:
    blocks = num_bytes // 4096
    dfloat11_decode.decode(
        meta(torch.uint8, num_bytes), meta(torch.uint8, num_bytes), words(256),
        meta(torch.int64, blocks + 1), meta(torch.uint8, 320 * blocks), bf16(num_bytes), words(blocks),
    )  # fmt: skip


HUGE = 2**31 - 1  # tiles, 8 TiB of BF16
COUNTS, TABLE, BYTES = meta(torch.int64, 256), meta(torch.uint32, 256), meta(torch.uint8, 256)
LAUNCHES: dict[str, Callable[[], None]] = {
    "decode": lambda: packed_decode.decode(desc(), HUGE, bf16(2), words(1), 1),
    "run": lambda: packed_decode.decode_run(desc(), HUGE, 0, HUGE, bf16(2), words(1), 1),
    "decode_group": lambda: group_decode.decode_group(
        meta(torch.int64, 17, 4), HUGE - 16, bf16(2), words(1), 1
    ),
    "fast_group": lambda: fast_group.decode_group(
        meta(torch.int64, 17, 4), HUGE, [(1 << 21, 1 << 12)] * 16, bf16(2), words(1)
    ),
    "experts": lambda: expert_decode.decode_chosen(
        desc(), 512, HUGE * 4, words(512), bf16(2), words(1), 1, HUGE
    ),
    "marks": lambda: expert_marks.mark_chosen(meta(torch.int64, 1 << 36), words(512), words(512)),
    "rows, many": lambda: packed_rows.decode_rows(
        desc(), meta(torch.int64, 1 << 24), 4, 8192, bf16(1 << 24, 8192)
    ),
    "rows, long": lambda: packed_rows.decode_rows(
        desc(), meta(torch.int64, 2), 4, 1 << 29, bf16(2, 1 << 29)
    ),
    "official unit": lambda: decode_unit(2**31 - 4096),
    "official": lambda: dfloat11_resident.decode_resident(desc(), 1 << 42, bf16(2), words(1)),
    "official run": lambda: dfloat11_resident.decode_resident_run(
        desc(), 1 << 40, 1, 1 << 39, bf16(2)
    ),
    "official rows, many": lambda: dfloat11_resident.decode_resident_rows(
        desc(), meta(torch.int64, 1 << 24), 4, 8192, bf16(1 << 24, 8192)
    ),
    "official rows, long": lambda: dfloat11_resident.decode_resident_rows(
        desc(), meta(torch.int64, 2), 4, 1 << 29, bf16(2, 1 << 29)
    ),
    "count": lambda: packed_encode.count_exponents(bf16(1 << 42), COUNTS),
    "measure": lambda: packed_encode.measure(bf16(1 << 42), 0, TABLE, BYTES, words(1)),
    "write": lambda: packed_encode.write(bf16(1 << 42), 0, TABLE, BYTES, words(1), TABLE, TABLE),
    "official measure": lambda: dfloat11_encode.measure(
        bf16(1 << 31), 2**31 - 1, BYTES, words(1 << 26)
    ),
    "official write": lambda: dfloat11_encode.write(
        bf16(1 << 31), 2**31 - 1, TABLE, BYTES, meta(torch.int64, 1 << 26), words(1), BYTES, COUNTS
    ),
    "official split": lambda: dfloat11_encode.split(bf16(1 << 31), meta(torch.uint8, 2**31 - 1)),
    "gemv": lambda: multiply(4, 1 << 26, 2048),
    "dot, 1.2 million rows": lambda: multiply(5, 1_200_000, 2048),
    "dot, 60 million rows": lambda: multiply(32, 60_000_000, 2048),
    "dot, tiles that seldom start at the same column": lambda: multiply(32, 1 << 20, (1 << 20) - 8),
    "fast": lambda: fast_decode.decode(desc(), 1 << 26, 1 << 14, bf16(2), words(1)),
    "fast experts": lambda: fast_experts.decode_chosen(
        desc(), 512, 1 << 15, 1 << 14, words(512), bf16(2), words(1)
    ),
    "fast run": lambda: fast_decode.decode_run(
        desc(), 1 << 26, 1 << 14, 0, 1 << 26, bf16(2), words(1)
    ),
    "fast rows, many": lambda: fast_rows.decode_rows(
        desc(), meta(torch.int64, 1 << 24), 4, 8192, bf16(1 << 24, 8192)
    ),
    "fast rows, long": lambda: fast_rows.decode_rows(
        desc(), meta(torch.int64, 2), 4, 1 << 29, bf16(2, 1 << 29)
    ),
    "dot, few tiles": lambda: multiply(32, 3, (1 << 24) - 8),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_grid_of_a_huge_matrix_is_one_that_cuda_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: "invalid argument" from CUDA for matrices of over 1.05 million rows of 2048 columns.
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **options: None

    kernel: Any = Kernel()
    for module in MODULES:
        for attribute in vars(module).copy():
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, kernel)
    LAUNCHES[name]()
    assert grids
    for grid in grids:
        assert all(0 < size <= most for size, most in zip(grid, LIMITS, strict=False)), grid


def test_fused_kernels_leave_rows_whose_places_need_more_than_32_bits_to_decoding() -> None:
    # Bug caught: row * cols of the activations in 32 bits.
    assert packed_matmul.is_supported(2**26 - 8)
    assert not packed_matmul.is_supported(2**26)
