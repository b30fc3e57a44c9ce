"""Bit equality of the fast layout's kernels on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`."""

import pytest
import torch
from fast_matrices import fast_matrices, large_fast_matrices
from gpu_helpers import DEVICE, NEEDS_GPU, captured, gaussian, nan_memory, no_rehearsal, of_size
from helpers import Bits, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.device import experts, fast_experts, fast_ops
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


@pytest.mark.parametrize("prmt", FORMS)
@pytest.mark.parametrize("shape", of_size([(128_256, 4096), (4097, 1023)], [(200, 300)]))
def test_gpu_decodes_runs_of_rows_and_nothing_beyond_them(
    shape: tuple[int, int], prmt: bool
) -> None:
    bits = gaussian(*shape)
    (rows, cols), expected, fast = shape, to_torch(bits).to(DEVICE), packed(bits)
    slab = -(-rows // 3 // 64) * 64
    for first in range(0, rows, slab):
        count = min(slab, rows - first)
        out = poisoned((slab * cols + 8,), unlike(bits), DEVICE)
        tiles = fast_ops.num_tiles(count, cols)
        status = torch.full((tiles + 1,), -1, dtype=torch.int32, device=DEVICE)
        fast_decode.decode_run(fast.desc, rows, cols, first, count, out, status, prmt=prmt)
        found, rest = out[: count * cols].view(count, cols), out[count * cols :]
        assert same_bits(found, expected[first : first + count])
        assert same_bits(rest, poisoned(tuple(rest.shape), unlike(bits), DEVICE))
        assert status[-1] == -1
        assert not status[:-1].any()


# w13 and w2 of Qwen3-30B-A3B; experts that share blocks of rows.
@pytest.mark.parametrize(
    "shape", of_size([(128, 1536, 2048), (128, 2048, 768), (16, 333, 77)], [(4, 64, 77)])
)
@pytest.mark.parametrize("is_in_graph", of_size([False, True], [False]))
def test_gpu_decodes_the_experts_that_got_tokens_and_no_other_blocks(
    shape: tuple[int, int, int], is_in_graph: bool
) -> None:
    num_experts, rows, cols = shape
    bits = gaussian(num_experts * rows, cols)
    fast, weight = packed(bits), to_torch(bits).to(DEVICE).view(shape)
    out = poisoned((bits.size,), unlike(bits), DEVICE)
    tiles = fast_ops.num_tiles(fast.rows, cols)
    status = torch.empty(tiles, dtype=torch.int32, device=DEVICE)
    chosen = torch.empty(num_experts, dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(2, dtype=torch.int32, device=DEVICE)

    def work() -> None:
        experts.mark_chosen(ids, None, chosen)
        fast_experts.launch_decode_chosen(fast.desc, *shape, chosen, out, status)

    replay = captured(work).replay if is_in_graph else work
    last = num_experts - 1
    for picked in ([1, 1], [last, 0], [last, last]):
        out.copy_(poisoned((bits.size,), unlike(bits), DEVICE))
        ids.copy_(torch.tensor(picked, dtype=torch.int32))
        replay()
        for expert in picked:
            assert same_bits(out.view(shape)[expert], weight[expert])
        far = last if picked == [1, 1] else 2  # in no tile with a chosen one
        rest = out.view(shape)[far]
        assert same_bits(rest, poisoned(tuple(rest.shape), unlike(bits), DEVICE))


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
