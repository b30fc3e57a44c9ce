"""Bit equality of every kernel on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`. Elsewhere the interpreter stands in."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import gaussian, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat import ops, resident_units, unit_ops
from vllm_dfloat.checkpoint.decode_unit import decode_unit
from vllm_dfloat.checkpoint.dfloat11 import open_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0",
        reason="needs an NVIDIA GPU and TRITON_INTERPRET=0",
    ),
]
HARD = hard_matrices()


def decode(
    packed: ops.PackedWeight, poison: int, op: Any = torch.ops.vllm_dfloat.decode
) -> torch.Tensor:
    numel = ops.padded_numel(packed.rows, packed.cols)
    out = torch.full((numel,), poison, dtype=torch.uint16, device="cuda").view(torch.bfloat16)
    status = torch.full(
        (ops.num_tiles(packed.rows, packed.cols),), -1, dtype=torch.int32, device="cuda"
    )
    op(packed.desc, packed.rows, packed.cols, out, status)
    assert not status.any()
    return out[: packed.rows * packed.cols].view(packed.rows, packed.cols)


@pytest.mark.parametrize("name", HARD)
def test_gpu_decodes_every_hard_matrix(name: str) -> None:
    weight = to_torch(HARD[name]).cuda()
    assert same_bits(decode(ops.pack(weight, name), unlike(HARD[name])), weight)


@pytest.mark.parametrize("shape", [(4096, 4096), (4097, 1023), (128, 53248)])
def test_gpu_decodes_layers_of_real_size(shape: tuple[int, int]) -> None:
    bits = gaussian(*shape)
    weight = to_torch(bits).cuda()
    packed = ops.pack(weight, "w")
    assert same_bits(decode(packed, unlike(bits)), weight)
    ids = torch.tensor([0, shape[0] - 1, 7], device="cuda")
    rows = torch.ops.vllm_dfloat.decode_rows(packed.desc, ids, *shape)
    assert same_bits(rows, weight[ids])


HELD = {"packed": (ops.pack, ops.decode), "dfloat11": (resident_units.pack, resident_units.decode)}


@pytest.mark.parametrize("layout", HELD)
def test_gpu_decodes_into_a_captured_graph_and_sees_new_weights_after_a_reload(
    layout: str,
) -> None:
    # Bug caught: a kernel argument that is baked into the graph instead of read from the descriptor.
    pack, decode_held = HELD[layout]
    first, second = (to_torch(gaussian(512, 640, seed=s)).cuda() for s in (1, 2))
    a, b = pack(first, "a"), pack(second, "b")
    out = torch.zeros(ops.padded_numel(512, 640), dtype=torch.bfloat16, device="cuda")
    status = torch.zeros(ops.num_tiles(512, 640), dtype=torch.int32, device="cuda")
    decode_held(a.desc, 512, 640, out, status)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_held(a.desc, 512, 640, out, status)
    for source, weight in ((a, first), (b, second)):
        a.desc.copy_(source.desc)
        out.fill_(1.0)
        graph.replay()
        assert same_bits(out[: 512 * 640].view(512, 640), weight)


def test_gpu_decodes_a_matrix_of_more_than_two_billion_weights() -> None:
    # Bug caught: offsets computed in 32 bits. Two matrices of the same rows would hide an offset that wrapped.
    rows, cols = 131_200, 16_384
    block = gaussian(1025, cols)
    bits = np.concatenate([block] * 128)
    assert bits.shape == (rows, cols)
    packed = ops.pack(to_torch(bits), "w")
    payload = packed.payload.cuda()
    desc = packed.desc.cuda()
    desc[0] = payload.data_ptr()
    out = torch.full(
        (ops.padded_numel(rows, cols),), unlike(block), dtype=torch.uint16, device="cuda"
    )
    status = torch.full((ops.num_tiles(rows, cols),), -1, dtype=torch.int32, device="cuda")
    ops.decode(desc, rows, cols, out.view(torch.bfloat16), status)
    assert not status.any()
    expected = to_torch(block).cuda()
    for i in range(128):
        part = out[i * block.size : (i + 1) * block.size].view(torch.bfloat16).view(1025, cols)
        assert same_bits(part, expected)


def test_gpu_decodes_every_official_edge_case() -> None:
    folder = Path(__file__).parent / "data/vectors/edge-good-df11"
    for entry in open_checkpoint(folder).units.values():
        unit = entry.load()
        weights = unit_ops.decode_unit(unit, torch.device("cuda"))
        assert np.array_equal(weights.cpu().view(torch.uint16).numpy(), decode_unit(unit)), (
            unit.name
        )


@pytest.mark.parametrize("name", HARD)
def test_gpu_decodes_every_hard_matrix_held_in_the_official_layout(name: str) -> None:
    weight = to_torch(HARD[name]).cuda()
    held = resident_units.pack(weight, name)
    assert same_bits(decode(held, unlike(HARD[name]), torch.ops.vllm_dfloat.decode_unit), weight)


@pytest.mark.parametrize("shape", [(4096, 4096), (4097, 1023), (128, 53248)])
def test_gpu_decodes_layers_of_real_size_held_in_the_official_layout(
    shape: tuple[int, int],
) -> None:
    bits = gaussian(*shape)
    weight = to_torch(bits).cuda()
    held = resident_units.pack(weight, "w")
    assert same_bits(decode(held, unlike(bits), torch.ops.vllm_dfloat.decode_unit), weight)
    ids = torch.tensor([0, shape[0] - 1, 7], device="cuda")
    rows = torch.ops.vllm_dfloat.decode_unit_rows(held.desc, ids, *shape)
    assert same_bits(rows, weight[ids])
