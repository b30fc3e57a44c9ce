"""Payloads in pinned host memory on a GPU: kernels read them where they are, and the bits are the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_helpers import (
    DEVICE,
    IS_REHEARSAL,
    NEEDS_GPU,
    captured,
    decode,
    gaussian,
    no_rehearsal,
    of_size,
)
from helpers import same_bits, to_torch

from vllm_dfloat.device import groups, ops, unit_resident
from vllm_dfloat.device.host_arena import HostArena

pytestmark = NEEDS_GPU
SHAPES = of_size([(4096, 4096), (4097, 1023), (28672, 8192)], [(40, 300)])
HELD = {"packed": (ops, ops.decode), "dfloat11": (unit_resident, unit_resident.decode)}


class Pinned:
    """Names pinned memory to torch by its address, which is that of the GPU too."""

    def __init__(self, host: torch.Tensor) -> None:
        place = host.data_ptr(), False
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": "|u1",
            "data": place,
            "version": 3,
        }


def on_host(held: Any) -> tuple[Any, HostArena]:
    """Return a weight with its payload in host memory, read by the GPU."""
    arena = HostArena(
        None if IS_REHEARSAL else lambda host: torch.as_tensor(Pinned(host), device=DEVICE)
    )
    moved = replace(held, payload=arena.put(held.payload, held.name))
    return moved.described_in(held.desc), arena


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("held_as", HELD)
def test_gpu_decodes_from_host_memory(held_as: str, shape: tuple[int, int]) -> None:
    module, op = HELD[held_as]
    weight = to_torch(gaussian(*shape)).to(DEVICE)
    held, arena = on_host(module.pack(weight, "w"))
    assert arena.num_bytes == held.payload.nbytes
    assert same_bits(decode(held, 0, op), weight)
    assert same_bits(module.unpack(held), weight)  # all bytes are compared too
    ids = torch.tensor([0, shape[0] - 1, 7], device=DEVICE)
    assert same_bits(module.unpack_rows(held, ids), weight[ids])


def test_gpu_decodes_a_group_whose_members_lie_here_and_there() -> None:
    weights = [to_torch(gaussian(*SHAPES[0], seed=seed)).to(DEVICE) for seed in (1, 2)]
    here, there = (ops.pack(weight) for weight in weights)
    there, _ = on_host(there)
    for found, expected in zip(groups.unpack([here, there]), weights, strict=True):
        assert same_bits(found, expected)


@no_rehearsal
def test_graph_reads_new_weights_from_host_memory() -> None:
    first, second = (to_torch(gaussian(4096, 4096, seed=seed)).to(DEVICE) for seed in (1, 2))
    held, arena = on_host(ops.pack(first))
    desc = held.desc
    out = torch.empty(ops.padded_numel(4096, 4096), dtype=torch.bfloat16, device=DEVICE)
    status = torch.empty(ops.num_tiles(4096, 4096), dtype=torch.int32, device=DEVICE)
    graph = captured(lambda: ops.decode(desc, 4096, 4096, out, status))
    new = ops.pack(second)
    moved = replace(new, payload=arena.put(new.payload)).described_in(desc)
    del new, held
    out.zero_()
    graph.replay()
    assert same_bits(out.view(4096, 4096), second)
    assert arena.num_bytes == moved.payload.nbytes  # the old payload's pages are gone


@no_rehearsal
def test_payload_in_host_memory_takes_no_memory_of_the_gpu() -> None:
    held = ops.pack(to_torch(gaussian(4096, 4096)).to(DEVICE))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    size = held.payload.nbytes
    moved, _ = on_host(held)
    del held
    assert torch.cuda.memory_allocated() <= before - size
    moved.check_descriptor()
    moved.check_payload()
