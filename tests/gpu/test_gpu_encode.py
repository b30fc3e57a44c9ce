"""The GPU encoder on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`. Without one, the interpreter is used."""

import numpy as np
import pytest
import torch
from gpu_helpers import NEEDS_GPU, gaussian, no_rehearsal
from helpers import hard_matrices, same_bits, to_torch

from vllm_dfloat.codec.encode import encode
from vllm_dfloat.codec.layout import PAD_WORDS, PackedTensor
from vllm_dfloat.device import ops, packed_encode

pytestmark = [*NEEDS_GPU, no_rehearsal]
HARD = hard_matrices()


def assert_same_bytes(weight: torch.Tensor) -> None:
    expected = encode(weight.cpu().contiguous().view(torch.uint16).numpy(), "w")
    packed = ops.pack(weight, "w")
    assert packed.payload.device == packed.desc.device == weight.device
    fields = int(expected.is_raw), expected.layout.num_words, expected.layout.code_bits
    assert packed.fields == fields
    assert packed.desc.tolist() == packed.words
    assert np.array_equal(packed.payload.cpu().numpy(), expected.payload)
    assert same_bits(ops.unpack(packed), weight.contiguous())


@pytest.mark.parametrize("name", HARD)
def test_gpu_gives_the_bytes_of_the_cpu_encoder(name: str) -> None:
    assert_same_bytes(to_torch(HARD[name]).cuda())


@pytest.mark.parametrize("shape", [(4096, 4096), (4097, 1023), (28672, 4096), (128, 53248)])
def test_gpu_gives_the_bytes_of_the_cpu_encoder_for_layers_of_real_size(
    shape: tuple[int, int],
) -> None:
    assert_same_bytes(to_torch(gaussian(*shape)).cuda())


def test_gpu_encodes_matrices_that_are_not_contiguous_or_not_aligned_in_row_order() -> None:
    weight = to_torch(gaussian(600, 901)).cuda()
    assert_same_bytes(weight.t())
    assert_same_bytes(weight[:, 3:800])
    assert_same_bytes(weight.view(-1)[1:540_001].view(600, 900))


def test_gpu_gives_the_same_bytes_every_time() -> None:
    # Bug caught: lanes that share a word and overwrite each other's bits, depending on their order.
    weight = to_torch(gaussian(2048, 2048)).cuda()
    first = ops.pack(weight, "w").payload
    for _ in range(20):
        assert torch.equal(ops.pack(weight, "w").payload, first)


def test_gpu_packs_with_little_memory_beside_the_matrix_and_its_payload() -> None:
    # So large that the checksum's fixed temporary memory is small in comparison.
    weight = torch.empty(16_384, 16_384, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    ops.pack(weight[:64], "w")  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed = ops.pack(weight, "w")
    beside = torch.cuda.max_memory_allocated() - before - packed.payload.numel()
    assert beside < 0.03 * 2 * weight.numel()


def test_gpu_encodes_a_matrix_of_more_than_two_billion_weights() -> None:
    # Bug caught: offsets or counts in 32 bits. The matrix repeats its first part, so each repeat has the same bytes.
    rows, cols, repeats = 1025, 16_384, 128
    bits = gaussian(rows, cols)
    block = encode(bits)
    assert block.layout.numel == block.layout.padded_numel
    lay, payload = packed_encode.encode(to_torch(bits).cuda().repeat(repeats, 1), "w")
    assert lay.numel > 1 << 31
    num_code_words = block.layout.num_words - PAD_WORDS
    assert lay.num_words == repeats * num_code_words + PAD_WORDS

    whole = PackedTensor(lay, payload.cpu().numpy())
    assert np.array_equal(whole.lut, block.lut)
    tiles = block.layout.num_tiles
    for i in range(repeats):
        at = slice(i * tiles, (i + 1) * tiles)
        assert np.array_equal(whole.sign_mantissa[at], block.sign_mantissa)
        assert np.array_equal(whole.lane_lengths[at], block.lane_lengths)
        assert np.array_equal(
            whole.tile_starts[at], block.tile_starts[:-1] + np.uint32(i * num_code_words)
        )
        words = whole.words[i * num_code_words : (i + 1) * num_code_words]
        assert np.array_equal(words, block.words[:num_code_words])
    assert whole.tile_starts[-1] == repeats * num_code_words
    assert not whole.words[-PAD_WORDS:].any()
