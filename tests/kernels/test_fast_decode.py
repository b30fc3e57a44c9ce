"""The kernels of the fast layout, in Triton's interpreter, against the original bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fast_matrices import fast_matrices, large_fast_matrices
from helpers import Bits, gaussian, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec import fast_encode
from vllm_dfloat.codec.fast_layout import FastTensor, size
from vllm_dfloat.device.packed_weight import make_descriptor
from vllm_dfloat.kernels.configs import INTERPRETED, override
from vllm_dfloat.kernels.fast_decode import decode
from vllm_dfloat.kernels.fast_rows import decode_rows

MATRICES = fast_matrices()
LARGE = large_fast_matrices()
CPU = torch.device("cpu")
SIZES = ["37 x 333", "100 x 328", "70 x 336", "whole tiles", "a raw tile at the edge"]
PARAMETERS = (
    dict(fast_tiles_per_program=4, fast_rows_at_once=8, fast_weights_at_once=8),
    dict(fast_tiles_per_program=1, fast_rows_per_program=16, fast_rows_at_once=16),
    dict(fast_tiles_per_program=2, fast_rows_per_program=32, fast_rows_at_once=32),
)


def described(weight: Bits) -> tuple[FastTensor, torch.Tensor]:
    """Return a matrix in the fast layout and its descriptor; the tensor must outlive the descriptor."""
    fast = fast_encode.encode(weight)
    assert fast is not None
    fields = (2, fast.layout.num_entries, fast.layout.base)
    return fast, make_descriptor(torch.from_numpy(fast.payload), fields, size(*weight.shape))


def decoded(fast: FastTensor, desc: torch.Tensor, poison: int) -> tuple[torch.Tensor, torch.Tensor]:
    lay = fast.layout
    out = poisoned((lay.numel,), poison, CPU)
    status = torch.full((lay.num_tiles,), -1, dtype=torch.int32)
    decode(desc, lay.rows, lay.cols, out, status)
    return out.view(lay.rows, lay.cols), status


def assert_decodes(weight: Bits) -> None:
    out, status = decoded(*described(weight), unlike(weight))
    assert not status.any()
    assert same_bits(out, to_torch(weight))


@pytest.mark.parametrize("name", MATRICES | LARGE)
def test_kernel_equals_the_original_on_poisoned_output(name: str) -> None:
    assert_decodes((MATRICES | LARGE)[name])


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_launch_parameters_change_no_bit(name: str, parameters: dict[str, int]) -> None:
    with override(replace(INTERPRETED, **parameters)):
        assert_decodes(MATRICES[name])


@pytest.mark.parametrize("name", [*SIZES, "specials and a zero row", "raw tiles"])
def test_rows_kernel_returns_the_rows_asked_for(name: str) -> None:
    weight = MATRICES[name]
    fast, desc = described(weight)
    rows, cols = weight.shape
    ids = torch.tensor(
        [0, rows - 1, rows // 2, 0, -1, 1 << 40]
    )  # vLLM masks ids outside afterwards
    out = poisoned((6, cols), unlike(weight), CPU)
    decode_rows(desc, ids, rows, cols, out)
    assert same_bits(out, to_torch(weight[np.clip(ids.numpy(), 0, rows - 1)]))
    assert fast.payload.size  # alive until here


@pytest.mark.parametrize("word", range(4))
def test_a_changed_descriptor_is_not_followed(word: int) -> None:
    weight = MATRICES["37 x 333"]
    fast, desc = described(weight)
    desc[word] ^= 1 << 20
    out, status = decoded(fast, desc, 0)
    assert out.isnan().all()
    assert (status == 4).all()
    rows = poisoned((1, 333), 0, CPU)
    decode_rows(desc, torch.tensor([5]), 37, 333, rows)
    assert rows.isnan().all()


def test_a_descriptor_is_not_followed_as_one_of_the_transposed_shape() -> None:
    fast, desc = described(MATRICES["whole tiles"])
    out = poisoned((128 * 1024,), 0, CPU)
    status = torch.full((16,), -1, dtype=torch.int32)
    decode(desc, 1024, 128, out, status)
    assert out.isnan().all()
    assert (status == 4).all()
    assert fast.payload.size


@pytest.mark.parametrize("start", [600, 0xFFFFFFFF])
def test_starts_that_contradict_each_other_are_reported(start: int) -> None:
    weight = MATRICES["raw tiles"].copy()
    weight[:64, :128] = 0  # raw, 4096 entries
    fast, desc = described(weight)
    fast.starts[1] = start
    _, status = decoded(fast, desc, 0)
    assert status.nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("starts", [(0, 0), (5, 0), (0x80000001, 0), (0xFFFFFFFF, 1)])
def test_a_tile_with_any_starts_has_no_more_escapes_than_a_tile_may_have(
    starts: tuple[int, int],
) -> None:
    # Bug caught: a difference below -2**31, cut to 32 bits, was a number of escapes: 67 million turns, or no end.
    weight = gaussian(64, 128)
    weight[3, 5] = 0
    fast, desc = described(weight)
    fast.starts[:] = starts
    _, status = decoded(fast, desc, 0)
    assert bool(status.any()) == (starts != (0, 0))
    decode_rows(desc, torch.tensor([3]), 64, 128, torch.empty(1, 128, dtype=torch.bfloat16))


def test_tiles_before_one_whose_entries_end_before_theirs_keep_their_escapes() -> None:
    weight = gaussian(128, 1024)
    weight[2, 2] = weight[66, 520] = 0
    weight[64:, 640:768] = 0x7FC1  # raw
    fast, desc = described(weight)
    fast.starts[16] = 0
    out, status = decoded(fast, desc, 0)
    assert status.nonzero()[:, 0].tolist() == [15]
    assert same_bits(out[:, :896], to_torch(weight)[:, :896])
