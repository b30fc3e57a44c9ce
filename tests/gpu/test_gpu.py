"""Bit equality of the decoders on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`. Without one, the interpreter is used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_helpers import (
    DEVICE,
    NEEDS_GPU,
    buffers,
    captured,
    decode,
    gaussian,
    nan_memory,
    no_rehearsal,
    of_size,
)
from helpers import Bits, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.device import ops, unit_decode, unit_resident
from vllm_dfloat.device.packed_weight import make_descriptor
from vllm_dfloat.dfloat11.decode import decode_unit

pytestmark = NEEDS_GPU
MATRICES = hard_matrices()
HARD = of_size(list(MATRICES), ["nan, inf, -0 and denormals", "uniform bits", "no rows"])
REAL = of_size([(4096, 4096), (4097, 1023), (128, 53248)], [(40, 300)])
HELD = {
    "packed": (ops.pack, ops.decode),
    "dfloat11": (unit_resident.pack, unit_resident.decode),
}


def assert_rows(held_as: str, held: Any, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Check chosen rows, decoded into poisoned memory, without and with a status of the tiles."""
    module = {"packed": ops, "dfloat11": unit_resident}[held_as]
    with nan_memory():
        rows = module.decode_rows(held.desc, ids, held.rows, held.cols)
        checked = module.unpack_rows(held, ids)
    assert same_bits(rows, expected)
    assert same_bits(checked, expected)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("held_as", HELD)
def test_gpu_decodes_every_hard_matrix(held_as: str, name: str) -> None:
    pack, op = HELD[held_as]
    weight = to_torch(MATRICES[name]).to(DEVICE)
    assert same_bits(decode(pack(weight, name), unlike(MATRICES[name]), op), weight)


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("held_as", HELD)
def test_gpu_decodes_layers_of_real_size(held_as: str, shape: tuple[int, int]) -> None:
    pack, op = HELD[held_as]
    bits = gaussian(*shape)
    weight = to_torch(bits).to(DEVICE)
    held = pack(weight, "w")
    assert not held.is_raw
    assert same_bits(decode(held, unlike(bits), op), weight)
    ids = torch.tensor([0, shape[0] - 1, 7, 7], device=DEVICE)
    assert_rows(held_as, held, ids, weight[ids])


@no_rehearsal
@pytest.mark.parametrize("held_as", HELD)
def test_gpu_decodes_into_a_captured_graph_and_sees_new_weights_after_a_reload(
    held_as: str,
) -> None:
    # Bug caught: a kernel argument that is fixed in the graph instead of read from the descriptor.
    pack, op = HELD[held_as]
    first, second = (to_torch(gaussian(512, 640, seed=s)).cuda() for s in (1, 2))
    a, b = pack(first, "a"), pack(second, "b")
    out, status = buffers(ops.num_tiles(512, 640), ops.padded_numel(512, 640), 0x7FC1)
    graph = captured(lambda: op(a.desc, 512, 640, out, status))
    for source, weight in ((a, first), (b, second)):
        source.described_in(a.desc)
        out.fill_(1.0)
        graph.replay()
        assert same_bits(out[: 512 * 640].view(512, 640), weight)


def on_gpu(held: ops.PackedWeight) -> ops.PackedWeight:
    """Return a copy on the GPU of a weight that was packed on the CPU."""
    payload = held.payload.cuda()
    desc = make_descriptor(payload, held.fields, held.size)
    return replace(held, payload=payload, desc=desc)


@no_rehearsal
@pytest.mark.parametrize("held_as", HELD)
def test_gpu_decodes_a_matrix_of_more_than_two_billion_weights(held_as: str) -> None:
    # Bug caught: offsets computed in 32 bits. Two halves with equal rows would hide an offset that wrapped.
    pack, op = HELD[held_as]
    block, repeats = gaussian(1025, 16_384), 128
    held = on_gpu(pack(to_torch(np.concatenate([block] * repeats)), "w"))
    assert not held.is_raw
    assert held.rows * held.cols > 1 << 31
    expected = to_torch(block).cuda()
    decoded = decode(held, unlike(block), op).view(repeats, *block.shape)
    for i in range(repeats):
        assert same_bits(decoded[i], expected)
    ids = torch.tensor([held.rows - 1, 0, held.rows // 2 + 3], device="cuda")
    assert_rows(held_as, held, ids, expected[ids % len(block)])


def edge_units() -> dict[str, Any]:
    folder = Path(__file__).parents[1] / "data/vectors/edge-good-df11"
    return {name: entry.load() for name, entry in open_checkpoint(folder).units.items()}


def assert_unit_decodes(unit: Any, expected: Bits) -> None:
    fields = (unit.stream, unit.sign_mantissa, unit.tables, unit.positions, unit.gaps)
    tensors = [torch.from_numpy(field).to(DEVICE) for field in fields]
    out, status = buffers(unit.num_blocks, unit.num_weights, unlike(expected))
    unit_decode.decode_dfloat11(*tensors, out, status)
    assert not status.any(), unit.name
    assert np.array_equal(out.cpu().view(torch.uint16).numpy(), expected), unit.name


@no_rehearsal  # minutes in the interpreter
def test_gpu_decodes_every_official_edge_case() -> None:
    units = edge_units()
    assert units
    for unit in units.values():
        assert_unit_decodes(unit, decode_unit(unit))


@no_rehearsal
def test_gpu_decodes_an_official_transformer_block() -> None:
    from vllm_dfloat.dfloat11.encode import as_unit, encode_unit

    members = [gaussian(rows, 4096, seed=rows) for rows in (4096, 1024, 14_336)]
    unit = as_unit(encode_unit(members, "layers.0"), "layers.0")
    expected = np.concatenate([member.reshape(-1) for member in members])
    assert_unit_decodes(unit, expected)
    for member, start in zip(members, unit.splits.tolist(), strict=False):
        part = unit_decode.decode_unit(unit, DEVICE, start, start + member.size)
        assert same_bits(part.view(member.shape), to_torch(member).cuda())
