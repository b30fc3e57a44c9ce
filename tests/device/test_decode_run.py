"""A run of rows of a compressed matrix, decoded by itself: what LM heads are multiplied from, slab by slab."""

import os
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import Bits, gaussian, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import ops
from vllm_dfloat.device import unit_resident as units
from vllm_dfloat.errors import FormatError

MATRICES = {
    "rows of whole tiles": gaussian(7, 2048),
    "four rows of three tiles": gaussian(14, 1536),
    "rows that tiles seldom begin with": gaussian(2049, 5),
    "64 columns": gaussian(200, 64),
    "bf16": hard_matrices()["uniform bits"],
    "zeros": np.zeros((70, 64), np.uint16),
}
LAYOUTS = {"packed": ops, "dfloat11": units}


@pytest.fixture(params=["numba", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=request.param):
        yield request.param


def rows_at_once(cols: int) -> int:
    """Return the smallest number of rows of which every run begins a tile."""
    return TILE_WEIGHTS // int(np.gcd(cols, TILE_WEIGHTS))


def run_of(
    module: object, held: ops.PackedWeight, first: int, count: int, poison: int
) -> torch.Tensor:
    numel = ops.padded_numel(count, held.cols)
    out = torch.full((numel + 8,), poison, dtype=torch.uint16).view(torch.bfloat16)
    status = torch.full((numel // TILE_WEIGHTS + 1,), -1, dtype=torch.int32)
    module.launch_decode_run(
        held.desc, held.rows, held.cols, first, count, out[:numel], status[:-1]
    )
    assert torch.all(out[numel:].view(torch.int16) == np.uint16(poison).astype(np.int16))
    assert status[-1] == -1
    if module is ops:
        assert not status[:-1].any()
    return out[: count * held.cols].view(count, held.cols)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MATRICES)
def test_every_run_of_rows_equals_these_rows_and_nothing_beyond_it_is_written(
    name: str, layout: str, backend: str
) -> None:
    bits, module = MATRICES[name], LAYOUTS[layout]
    held = module.pack(to_torch(bits), "w")
    rows, step = bits.shape[0], rows_at_once(bits.shape[1])
    starts = range(0, rows, step)
    for first in {0, starts[len(starts) // 2], starts[-1]}:
        for count in {min(step, rows - first), rows - first}:
            found = run_of(module, held, first, count, unlike(bits))
            assert same_bits(found, to_torch(bits[first : first + count])), (first, count)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_not_decoded_by_a_changed_descriptor(layout: str, backend: str) -> None:
    bits, module = gaussian(64, 64), LAYOUTS[layout]
    held = module.pack(to_torch(bits), "w")
    held.desc[0] += 16
    decode: Callable[[], torch.Tensor] = lambda: run_of_any(module, held)  # noqa: E731
    if backend == "numba":
        with pytest.raises(FormatError, match="descriptor"):
            decode()
    else:
        assert torch.isnan(decode()).all()


def run_of_any(module: object, held: ops.PackedWeight) -> torch.Tensor:
    out = torch.zeros(TILE_WEIGHTS, dtype=torch.bfloat16)
    module.launch_decode_run(held.desc, 64, 64, 32, 32, out, torch.zeros(1, dtype=torch.int32))
    return out


def test_the_cpu_decodes_a_run_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "numba")
    monkeypatch.setenv("VLLM_DFLOAT_THREADS", "3")
    bits: Bits = gaussian(600, 2048)
    held = ops.pack(to_torch(bits), "w")
    assert same_bits(run_of(ops, held, 100, 480, unlike(bits)), to_torch(bits[100:580]))
