"""The Triton kernels of the packed layout, in Triton's interpreter, against the oracle."""

import numpy as np
import pytest
import torch
from helpers import Bits, gaussian, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.codec import layout
from vllm_dfloat.device import ops
from vllm_dfloat.kernels import packed_decode as kernels
from vllm_dfloat.kernels.packed_rows import decode_rows

HARD = hard_matrices()
SLOW = {
    "65,536 patterns among gaussians"
}  # 160 tiles: minutes in the interpreter, and numba covers it


def run_kernel(weight: Bits, tiles_per_program: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = ops.pack(to_torch(weight), "w")
    numel = ops.padded_numel(*weight.shape)
    out = torch.full((numel,), unlike(weight), dtype=torch.uint16).view(torch.bfloat16)
    status = torch.full((numel // layout.TILE_WEIGHTS,), -1, dtype=torch.int32)
    kernels.decode(packed.desc, status.numel(), out, status, tiles_per_program)
    return out[: weight.size].view(*weight.shape), status


@pytest.mark.parametrize("name", [name for name in HARD if name not in SLOW])
def test_kernel_equals_the_original_on_poisoned_output(name: str) -> None:
    out, status = run_kernel(HARD[name], 16)
    assert not status.any()
    assert same_bits(out, to_torch(HARD[name]))


@pytest.mark.parametrize("tiles_per_program", [1, 2, 4])
def test_kernel_decodes_whatever_the_number_of_tiles_per_program(tiles_per_program: int) -> None:
    # Bug caught: the last program has fewer tiles than the others.
    weight = gaussian(25, 500)  # 7 tiles
    out, status = run_kernel(weight, tiles_per_program)
    assert not status.any()
    assert same_bits(out, to_torch(weight))


@pytest.mark.parametrize("shape", [(300, 17), (9, 2048), (5, 3000), (4, 5001), (3000, 1)])
def test_rows_kernel_returns_the_rows_asked_for(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    packed = ops.pack(to_torch(weight), "w")
    assert not packed.is_raw or weight.size < 6000
    ids = torch.tensor([0, shape[0] - 1, shape[0] // 2, 0])
    out = torch.full((4, shape[1]), unlike(weight), dtype=torch.uint16).view(torch.bfloat16)
    decode_rows(packed.desc, ids, *shape, out)
    assert same_bits(out, to_torch(weight[ids.numpy()]))


def test_rows_kernel_copies_from_a_matrix_held_as_bf16() -> None:
    weight = HARD["uniform bits"]
    packed = ops.pack(to_torch(weight), "w")
    assert packed.is_raw
    out = torch.full((2, 65), unlike(weight), dtype=torch.uint16).view(torch.bfloat16)
    decode_rows(packed.desc, torch.tensor([63, 1]), 64, 65, out)
    assert same_bits(out, to_torch(weight[[63, 1]]))


def test_flipped_bits_end_with_a_status_or_decode_and_equal_the_cpu_decoder() -> None:
    # Bug caught: a corrupt lane length or tile start, with which a lane reads outside the payload; in the interpreter
    # the process then crashes.
    weight = gaussian(50, 205)  # 6 tiles
    rng = np.random.default_rng(3)
    reported = 0
    for _ in range(25):
        packed = ops.pack(to_torch(weight), "w")
        payload = packed.payload.numpy()
        for position in rng.integers(0, payload.size, 40):
            payload[position] ^= 1 << rng.integers(0, 8)
        numel = ops.padded_numel(*weight.shape)
        results = []
        for run in (kernels.decode, None):
            out = torch.full((numel,), 0x1234, dtype=torch.uint16).view(torch.bfloat16)
            status = torch.full((numel // layout.TILE_WEIGHTS,), -1, dtype=torch.int32)
            if run:
                run(packed.desc, status.numel(), out, status, 8)
            else:
                ops.decode(packed.desc, *weight.shape, out, status)
            assert (status >= 0).all()
            results.append((out, status != 0))
        reported += bool(results[0][1].any())
        assert torch.equal(results[0][1], results[1][1])
        sound = ~results[0][1]
        decoded = [r[0].view(-1, layout.TILE_WEIGHTS)[sound] for r in results]
        assert same_bits(*decoded)
    assert reported > 20
