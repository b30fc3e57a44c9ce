"""Compressing to the official layout on a GPU: `TRITON_INTERPRET=0 pytest -m gpu`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dfloat11_helpers import VECTORS, edge_originals, long_book, long_code_weights, stored_unit
from gpu_helpers import DEVICE, NEEDS_GPU, gaussian, no_rehearsal, of_size
from interrupted import contents

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.device.unit_coder import DeviceCoder, coder_of
from vllm_dfloat.dfloat11.coder import Codes64, CpuCoder
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit
from vllm_dfloat.storage import pieces

pytestmark = NEEDS_GPU
SHIPPED = Path(__file__).parents[2] / "models/tiny"


def assert_same(made: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for field, array in expected.items():
        assert np.array_equal(made[field], array), field


@pytest.mark.parametrize(
    "name", of_size(sorted(open_checkpoint(VECTORS / "edge-good-df11").units), ["all_0_to_239"])
)
def test_gpu_gives_the_official_bytes_of_edge_units(name: str) -> None:
    stored = stored_unit("edge-good", name)
    weights = np.split(edge_originals()[name], stored["split_positions"])
    assert_same(encode_unit(weights, name, DeviceCoder(DEVICE)), stored)


@pytest.mark.parametrize("sizes", of_size([(1 << 26, 4097, 3 << 20)], [(4097, 5000)]))
def test_gpu_gives_the_bytes_of_the_cpu_encoder_for_members_of_real_size(
    sizes: tuple[int, ...],
) -> None:
    weights = [gaussian(1, size, seed=size) for size in sizes]
    expected = encode_unit(weights, "u")
    coder = DeviceCoder(DEVICE)
    for _ in range(3):  # the order of the lanes must not matter
        assert_same(encode_unit(weights, "u", coder), expected)
    unit, flat = as_unit(expected, "u"), np.concatenate([w.reshape(-1) for w in weights])
    assert coder.equals(unit, 0, flat)
    flat[-1] ^= 1
    assert not coder.equals(unit, 5, flat[5:])


@pytest.mark.parametrize("size", of_size([100_000], [700]))
def test_gpu_joins_codes_of_up_to_32_bits(size: int) -> None:
    blocks = 32 * size // 32_768 + 2
    outs = [
        Codes64(
            np.zeros(512 * blocks, np.uint64),
            np.zeros(512 * blocks, np.uint8),
            np.zeros(blocks, int),
        )
        for _ in range(2)
    ]
    book, weights = long_book(), long_code_weights(size)
    coders = CpuCoder(), DeviceCoder(DEVICE)
    ends = [coders[i].write(weights, book, 777, outs[i]) for i in range(2)]
    assert ends[0] == ends[1]
    for made, expected in zip(vars(outs[1]).values(), vars(outs[0]).values(), strict=True):
        assert np.array_equal(made, expected)


@no_rehearsal
def test_gpu_holds_one_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_THREADS", "1")
    coder, piece = DeviceCoder(DEVICE), pieces.PIECE_WEIGHTS
    weights = [gaussian(1, 64 * piece)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encode_unit(weights, "u", coder)
    assert torch.cuda.max_memory_allocated() - before < 16 * piece


@no_rehearsal
def test_compress_on_a_gpu_writes_the_files_of_the_cpu(tmp_path: Path) -> None:
    source = open_source(SHIPPED)
    compress(source, tmp_path / "cpu")
    compress(source, tmp_path / "cuda", workers=4, coder=coder_of("cuda"))
    assert coder_of("auto") is not None
    left, right = tmp_path / "cpu", tmp_path / "cuda"
    assert contents(left) == contents(right)
