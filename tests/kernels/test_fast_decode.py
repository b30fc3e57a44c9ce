"""The decode kernel of the fast layout, in Triton's interpreter, against the original bits."""

import pytest
import torch
from fast_matrices import fast_matrices, large_fast_matrices
from helpers import Bits, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec.fast_layout import FastLayout
from vllm_dfloat.device import fast_encode
from vllm_dfloat.kernels.fast_decode import decode_sections

MATRICES = fast_matrices() | large_fast_matrices()
PARAMETERS = (
    dict(),
    dict(rows_at_once=16, tiles_per_program=2, at_once=16),
    dict(rows_per_program=16, rows_at_once=16, tiles_per_program=1, at_once=16),
    dict(rows_per_program=32, rows_at_once=4, tiles_per_program=8),
)


def sections(layout: FastLayout, payload: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def words(offset: int, numel: int) -> torch.Tensor:
        return payload[offset : offset + 4 * numel].view(torch.uint32)

    return (
        payload[: layout.high_offset],
        words(layout.high_offset, layout.rows * layout.pitch // 8),
        words(layout.starts_offset, layout.num_tiles + 1),
        words(layout.entries_offset, layout.num_entries),
    )


def decoded(weight: Bits, **parameters: int) -> torch.Tensor:
    found = fast_encode.encode(to_torch(weight))
    assert found is not None
    layout, payload = found
    out = poisoned(weight.shape, unlike(weight), payload.device)
    decode_sections(*sections(layout, payload), layout.base, out, prmt=False, **parameters)
    return out


@pytest.mark.parametrize("name", MATRICES)
def test_kernel_equals_the_original_on_poisoned_output(name: str) -> None:
    assert same_bits(decoded(MATRICES[name]), to_torch(MATRICES[name]))


@pytest.mark.parametrize("parameters", PARAMETERS[1:], ids=str)
@pytest.mark.parametrize(
    "name", ["37 x 333", "100 x 328", "whole tiles", "heavy tails", "raw tiles"]
)
def test_launch_parameters_change_no_bit(name: str, parameters: dict[str, int]) -> None:
    assert same_bits(decoded(MATRICES[name], **parameters), to_torch(MATRICES[name]))
