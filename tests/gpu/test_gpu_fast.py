"""Bit equality of the fast layout's kernels on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`."""

import pytest
import torch
from fast_matrices import fast_matrices, large_fast_matrices
from gpu_helpers import DEVICE, NEEDS_GPU, captured, gaussian, nan_memory, no_rehearsal, of_size
from helpers import Bits, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.device import fast_ops
from vllm_dfloat.kernels import fast_decode, fast_rows

pytestmark = NEEDS_GPU
MATRICES = fast_matrices() | large_fast_matrices()
NAMES = of_size(list(MATRICES), ["37 x 333", "100 x 328", "70 x 336", "a raw tile at the edge"])
FORMS = of_size([True, False], [False])  # with PRMT, and in plain Triton
REAL = of_size([(4096, 4096), (4097, 1023), (128, 53248)], [(40, 300)])
REAL_FORMS = [(shape, prmt) for shape in REAL for prmt in FORMS]
REAL_FORMS += of_size(
    [((128_256, 4096), True)], []
)  # in the form that is served: half a billion weights


def packed(weight: Bits) -> fast_ops.FastWeight:
    fast = fast_ops.pack(to_torch(weight).to(DEVICE), "w")
    assert fast is not None
    return fast


def assert_decodes(weight: Bits, prmt: bool) -> None:
    fast, expected = packed(weight), to_torch(weight).to(DEVICE)
    rows, cols = weight.shape
    out = poisoned((weight.size,), unlike(weight), DEVICE)
    status = torch.full((fast_ops.num_tiles(rows, cols),), -1, dtype=torch.int32, device=DEVICE)
    fast_decode.decode(fast.desc, rows, cols, out, status, prmt=prmt)
    assert not status.any()
    assert same_bits(out.view(rows, cols), expected)
    ids = torch.tensor([0, rows - 1, rows // 2], dtype=torch.int32, device=DEVICE)
    some = poisoned((3, cols), unlike(weight), DEVICE)
    fast_rows.decode_rows(fast.desc, ids, rows, cols, some, prmt=prmt)
    assert same_bits(some, expected[ids.long()])


@pytest.mark.parametrize("prmt", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_gpu_decodes_every_hard_matrix_in_both_forms(name: str, prmt: bool) -> None:
    assert_decodes(MATRICES[name], prmt)


@pytest.mark.parametrize(("shape", "prmt"), REAL_FORMS)
def test_gpu_decodes_layers_of_real_size(shape: tuple[int, int], prmt: bool) -> None:
    assert_decodes(gaussian(*shape), prmt)


@pytest.mark.parametrize("name", NAMES)
def test_gpu_encodes_to_the_bytes_of_the_cpu(name: str) -> None:
    fast, expected = packed(MATRICES[name]), encode(MATRICES[name])
    assert expected is not None
    assert torch.equal(fast.payload.cpu(), torch.from_numpy(expected.payload))


def test_a_changed_descriptor_gives_nan_and_a_status() -> None:
    fast = packed(MATRICES["37 x 333"])
    fast.desc[1] += 1
    out = torch.zeros(37 * 333, dtype=torch.bfloat16, device=DEVICE)
    status = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    fast_decode.decode(fast.desc, 37, 333, out, status)
    assert out.isnan().all()
    assert (status == 4).all()


@no_rehearsal
def test_a_captured_graph_sees_new_weights_under_the_same_descriptor() -> None:
    first, second = packed(gaussian(256, 1024)), packed(gaussian(256, 1024, 1))
    out = torch.zeros(256 * 1024, dtype=torch.bfloat16, device=DEVICE)
    status = torch.zeros(fast_ops.num_tiles(256, 1024), dtype=torch.int32, device=DEVICE)
    graph = captured(lambda: fast_ops.decode(first.desc, 256, 1024, out, status))
    moved = second.described_in(first.desc)
    graph.replay()
    assert same_bits(out.view(256, 1024), fast_ops.unpack(moved))


def test_rows_are_decoded_into_memory_full_of_nan() -> None:
    fast = packed(MATRICES["100 x 328"])
    ids = torch.tensor([99, 0], device=DEVICE)
    with nan_memory():
        found = fast_ops.decode_rows(fast.desc, ids, 100, 328)
    assert same_bits(found, to_torch(MATRICES["100 x 328"]).to(DEVICE)[ids])
