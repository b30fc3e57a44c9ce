"""A run of rows of a compressed matrix, decoded by itself: what LM heads are multiplied from, slab by slab."""

import os
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from fast_matrices import fast_matrices
from helpers import Bits, gaussian, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.codec.fast_layout import TILE_ROWS
from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import fast_ops, ops
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
FAST_MATRICES = fast_matrices()
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


def run_of_any(module: object, held: ops.PackedWeight, first: int = 32) -> torch.Tensor:
    out = torch.zeros(TILE_WEIGHTS, dtype=torch.bfloat16)
    status = torch.zeros(1, dtype=torch.int32)
    module.launch_decode_run(held.desc, held.rows, 64, first, 32, out, status)
    return out


@pytest.mark.parametrize("name", FAST_MATRICES)
def test_every_run_of_tiles_of_the_fast_layout_equals_its_rows_and_has_their_status(
    name: str, backend: str
) -> None:
    bits = FAST_MATRICES[name]
    held, (rows, cols), poison = fast_ops.pack_again(to_torch(bits)), bits.shape, unlike(bits)
    starts = range(0, rows, TILE_ROWS)
    for first in {0, starts[len(starts) // 2], starts[-1]}:
        for count in {min(TILE_ROWS, rows - first), rows - first}:
            tiles = fast_ops.num_tiles(count, cols)
            out = torch.full((count * cols + 8,), poison, dtype=torch.uint16).view(torch.bfloat16)
            status = torch.full((tiles + 1,), -1, dtype=torch.int32)
            fast_ops.launch_decode_run(held.desc, rows, cols, first, count, out[:-8], status)
            found = out[:-8].view(count, cols)
            assert same_bits(found, to_torch(bits[first : first + count])), (first, count)
            assert (out[-8:].view(torch.int16) == np.uint16(poison).astype(np.int16)).all()
            assert status.tolist() == [0] * tiles + [-1]


def test_a_run_of_the_fast_layout_is_not_decoded_by_a_changed_descriptor(backend: str) -> None:
    held = fast_ops.pack_again(to_torch(gaussian(128, 64)), "w")
    held.desc[0] += 16
    if backend == "numba":
        with pytest.raises(FormatError, match="descriptor"):
            run_of_any(fast_ops, held, TILE_ROWS)
    else:
        assert torch.isnan(run_of_any(fast_ops, held, TILE_ROWS)).all()


def test_the_cpu_decodes_a_run_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "numba")
    monkeypatch.setenv("VLLM_DFLOAT_THREADS", "3")
    bits: Bits = gaussian(600, 2048)
    held = ops.pack(to_torch(bits), "w")
    assert same_bits(run_of(ops, held, 100, 480, unlike(bits)), to_torch(bits[100:580]))
