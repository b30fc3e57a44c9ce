"""Official units decoded as a device would: the op under opcheck, both backends, damage."""

import dataclasses
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from vllm_dfloat import unit_ops
from vllm_dfloat.checkpoint.decode_unit import decode_unit
from vllm_dfloat.checkpoint.dfloat11 import open_checkpoint
from vllm_dfloat.checkpoint.unit import Unit
from vllm_dfloat.errors import FormatError

VECTORS = Path(__file__).parent / "data/vectors"
CPU = torch.device("cpu")


def unit(name: str) -> Unit:
    return open_checkpoint(VECTORS / "edge-good-df11").units[name].load()


NAMES = list(open_checkpoint(VECTORS / "edge-good-df11").units)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_both_backends_decode_every_official_edge_case(backend: str, name: str) -> None:
    with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=backend):
        weights = unit_ops.decode_unit(unit(name), CPU)
    assert np.array_equal(weights.view(torch.uint16).numpy(), decode_unit(unit(name)))


def test_the_decoder_gives_views_of_one_decoding() -> None:
    whole = unit(NAMES[0])
    decoder = unit_ops.UnitDecoder(CPU)
    first, second = decoder(whole, 0, 1), decoder(whole, 1, 2)
    assert second.data_ptr() == first.data_ptr() + 2
    assert first.view(torch.uint16).item() == decode_unit(whole)[0]


def test_op_passes_opcheck() -> None:
    whole = unit(NAMES[0])
    fields = (whole.stream, whole.sign_mantissa, whole.tables, whole.positions, whole.gaps)
    tensors = [torch.from_numpy(np.array(field)) for field in fields]
    out = torch.zeros(whole.num_weights, dtype=torch.bfloat16)
    status = torch.zeros(whole.num_blocks, dtype=torch.int32)
    torch.library.opcheck(torch.ops.vllm_dfloat.decode_dfloat11, (*tensors, out, status))


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
        unit_ops.decode_unit(damaged, CPU)
