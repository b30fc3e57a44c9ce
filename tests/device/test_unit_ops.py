"""Official units decoded with the functions for devices: both backends, damage."""

import dataclasses
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import gaussian

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.device import unit_decode
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import FormatError

VECTORS = Path(__file__).parents[1] / "data/vectors"
CPU = torch.device("cpu")


def unit(name: str) -> Unit:
    return open_checkpoint(VECTORS / "edge-good-df11").units[name].load()


NAMES = list(open_checkpoint(VECTORS / "edge-good-df11").units)


SMALL = [name for name in NAMES if unit(name).num_weights < 5000]


# The kernel itself has all of them in test_decode_dfloat11_kernel.py.
@pytest.mark.parametrize(
    ("backend", "name"), [*(("numba", n) for n in NAMES), *(("triton", n) for n in SMALL)]
)
def test_both_backends_decode_official_edge_cases(backend: str, name: str) -> None:
    with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend):
        weights = unit_decode.decode_unit(unit(name), CPU)
    assert np.array_equal(weights.view(torch.uint16).numpy(), decode_unit(unit(name)))


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_both_backends_decode_any_range_of_a_unit(backend: str) -> None:
    weights = gaussian(40, 1000, seed=3)
    whole = as_unit(encode_unit([weights], "u"), "u")
    bits = weights.reshape(-1)
    _, one, two, *_ = whole.positions.tolist()
    ranges = [(0, 1), (one - 1, one + 1), (one, two), (two + 1, bits.size), (5, 5), (one, one)]
    with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend):
        for start, stop in ranges:
            found = unit_decode.decode_unit(whole, CPU, start, stop)
            assert np.array_equal(found.view(torch.uint16).numpy(), bits[start:stop])
        with pytest.raises(ValueError, match=r"weights 5\.\.40001 of 40000"):
            unit_decode.decode_unit(whole, CPU, 5, 40_001)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_damage_at_the_seam_of_a_piece_is_seen(backend: str) -> None:
    # Bug caught: a piece that ends with its last block, whose end then cannot be compared with the next block.
    whole = as_unit(encode_unit([gaussian(40, 1000, seed=3)], "u"), "u")
    gaps = np.array(whole.gaps)
    window = 2 * 512  # the first of block 2
    gaps[window * 5 // 8] ^= 0x08
    damaged = dataclasses.replace(whole, gaps=gaps)
    with (
        mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend),
        pytest.raises(FormatError, match="block 1 ended with status 4"),
    ):
        unit_decode.decode_unit(damaged, CPU, int(whole.positions[1]), int(whole.positions[2]))


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_a_damaged_stream_is_refused_with_file_unit_and_block(backend: str) -> None:
    whole = unit("three_members") if "three_members" in NAMES else unit(NAMES[-1])
    stream = np.array(whole.stream)
    stream[: stream.size // 2] ^= 0x5A
    damaged = dataclasses.replace(whole, stream=stream)
    with (
        mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend),
        pytest.raises(
            FormatError, match=r"model\.safetensors: .*encoded_exponent: block 0 ended with status"
        ),
    ):
        unit_decode.decode_unit(damaged, CPU)
