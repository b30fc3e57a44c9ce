"""Rows of matrices with over 2**31 weights, looked up with 32-bit ids, which vLLM's input ids are on a GPU."""

import mmap
from collections.abc import Callable

import pytest
import torch

from vllm_dfloat.device import ops, unit_resident
from vllm_dfloat.device.packed_weight import make_descriptor

ROWS, COLS = 2**21 + 2, 1024


@pytest.mark.parametrize(
    ("decode_rows", "size"),
    [(ops.decode_rows, ops.num_tiles(ROWS, COLS)), (unit_resident.decode_rows, -ROWS * COLS)],
)
def test_row_behind_the_first_2_to_the_31_weights_is_found(
    decode_rows: Callable[..., torch.Tensor], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: row * cols in 32 bits: the kernel reads 4 GiB before the payload, where this test has zeros.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    row = torch.arange(1, COLS + 1, dtype=torch.int16)
    with mmap.mmap(-1, 4 * ROWS * COLS) as memory:  # only pages that are touched take memory
        weights = torch.frombuffer(memory, dtype=torch.int16)[ROWS * COLS :]
        weights[(ROWS - 1) * COLS :] = row
        desc = make_descriptor(weights, (ops.KIND_RAW, 0, 0), size)
        found = decode_rows(desc, torch.tensor([ROWS - 1], dtype=torch.int32), ROWS, COLS)
        del weights  # otherwise the memory could not be unmapped
    assert torch.equal(found[0].view(torch.int16), row)
