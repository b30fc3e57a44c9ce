"""The kernels that encode the official layout, in Triton's interpreter: the same bytes as the CPU encoder."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from dfloat11_helpers import VECTORS, edge_originals, long_book, long_code_weights, stored_unit
from helpers import bf16_bits, gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import contents
from safetensors.torch import save_file

import vllm_dfloat.kernels.dfloat11_encode
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.device import unit_coder
from vllm_dfloat.dfloat11.coder import Book, Codes64, CpuCoder
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import DeviceError, FormatError
from vllm_dfloat.storage import pieces

CPU = CpuCoder()
EDGE_UNITS = open_checkpoint(VECTORS / "edge-good-df11").units


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """Fill every torch.empty with values that no encoder writes, so that elements a kernel misses are seen."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **options).fill_(0x5A)

    with mock.patch.object(torch, "empty", poisoned):
        yield


@pytest.fixture(scope="module")
def coder() -> unit_coder.DeviceCoder:
    return unit_coder.DeviceCoder(torch.device("cpu"))


def assert_same(made: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert made.keys() == expected.keys()
    for field, array in expected.items():
        assert made[field].dtype == array.dtype, field
        assert np.array_equal(made[field], array), field


@pytest.mark.parametrize("name", EDGE_UNITS)
def test_edge_originals_become_the_official_bytes(name: str, coder: unit_coder.DeviceCoder) -> None:
    stored = stored_unit("edge-good", name)
    weights = np.split(edge_originals()[name], stored["split_positions"])
    assert_same(encode_unit(weights, name, coder), stored)


def test_a_unit_of_a_model_becomes_the_official_bytes_again(
    coder: unit_coder.DeviceCoder,
) -> None:
    stored = stored_unit("llama-tiny", "model.embed_tokens")
    unit = open_checkpoint(VECTORS / "llama-tiny-df11").units["model.embed_tokens"].load()
    weights = np.split(decode_unit(unit), stored["split_positions"])
    assert_same(encode_unit(weights, unit.name, coder), stored)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=3),
    st.sampled_from([4095, 10_001]),
    st.integers(1, 8),
    st.integers(0, 2**31),
)
def test_members_and_pieces_of_any_size_give_the_bytes_of_the_cpu_encoder(
    sizes: list[int], piece: int, power: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = [bf16_bits(rng.standard_normal(size) ** power) for size in sizes]
    coder = unit_coder.DeviceCoder(torch.device("cpu"))
    with mock.patch.object(pieces, "PIECE_WEIGHTS", piece):
        made = encode_unit(weights, "u", coder)
    assert_same(made, encode_unit(weights, "u"))


def codes64(blocks: int, bit: int) -> Codes64:
    """Return windows as the encoder gives them, the last one written up to `bit`; parts to be set are poisoned."""
    windows = 512 * blocks + 1
    words = np.zeros(windows, np.uint64)
    words[bit >> 6] = (1 << 64) - (1 << (64 - bit % 64)) if bit % 64 else 0
    return Codes64(words, np.full(windows, 77, np.uint8), np.full(blocks + 1, -7))


@pytest.mark.parametrize(
    ("size", "tiles", "bits"),
    [
        (1, 1, (0, 31, 63, 32_767)),
        (31, 4, (7,)),
        (32, 1, (64,)),
        (33, 4, (1,)),
        (512, 1, (31_751,)),
        (513, 1, (32_767,)),
        (3000, 2, (31_751,)),
    ],
)
def test_codes_of_up_to_32_bits_are_joined_without_loss_from_any_bit_on(
    size: int, tiles: int, bits: tuple[int, ...]
) -> None:
    # Bug caught: shifts by 32; a bit counted from another block than the program's; a lane past the end.
    coder = unit_coder.DeviceCoder(torch.device("cpu"), tiles)
    book = long_book()
    weights = long_code_weights(size)
    for bit in bits:
        expected, made = codes64(8, bit), codes64(8, bit)
        end = CPU.write(weights, book, bit, expected)
        assert coder.write(weights, book, bit, made) == end
        assert np.array_equal(made.words, expected.words)
        assert np.array_equal(made.first_bits, expected.first_bits)
        assert np.array_equal(made.begins, expected.begins)


@pytest.mark.parametrize("size", [1, 2047, 2048, 6000])
def test_counts_signs_and_mantissas_are_those_of_the_cpu(
    size: int, coder: unit_coder.DeviceCoder
) -> None:
    weights = np.random.default_rng(size).integers(0, 1 << 16, size).astype(np.uint16)
    assert np.array_equal(coder.count(weights), CPU.count(weights))
    assert np.array_equal(coder.sign_mantissa(weights), CPU.sign_mantissa(weights))


def test_a_single_flipped_bit_is_seen_by_the_comparison(coder: unit_coder.DeviceCoder) -> None:
    weights = gaussian(1, 30_000).reshape(-1)
    unit = as_unit(encode_unit([weights], "u"), "u")
    assert coder.equals(unit, 0, weights)
    assert coder.equals(unit, 12_345, weights[12_345:])
    changed = weights[1000:].copy()
    changed[-1] ^= 0x8000
    assert not coder.equals(unit, 1000, changed)


def test_compress_gives_the_same_files_as_on_the_cpu(
    tmp_path: Path, coder: unit_coder.DeviceCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    (tmp_path / "m").mkdir()
    tensors = {
        f"h.{i}.{name}.weight": torch.from_numpy(gaussian(64, 96, i)).view(torch.bfloat16)
        for i in range(2)
        for name in "ab"
    }
    save_file(tensors, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text(json.dumps({}))
    source = open_source(tmp_path / "m")
    compress(source, tmp_path / "cpu")
    with mock.patch.object(pieces, "PIECE_WEIGHTS", 5000):
        compress(source, tmp_path / "device", coder=coder)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "device")


def test_a_coder_is_checked_before_it_is_used(coder: unit_coder.DeviceCoder) -> None:
    unit_coder.check_coder(coder, "cuda:3")

    class Broken(CpuCoder):
        def sign_mantissa(self, weights: np.ndarray) -> np.ndarray:
            out = super().sign_mantissa(weights)
            out[-1] ^= 1
            return out

    with pytest.raises(DeviceError, match="cuda:3: encodes a test pattern with a wrong sign_man"):
        unit_coder.check_coder(Broken(), "cuda:3")


def test_a_coder_whose_kernels_write_nothing_is_refused_in_one_sentence() -> None:
    class WritesNothing(CpuCoder):
        def write(self, weights: np.ndarray, book: Book, bit: int, out: Codes64) -> int:
            return bit

    class DecodesNothing(CpuCoder):
        def equals(self, unit: Unit, start: int, weights: np.ndarray) -> bool:
            raise FormatError("block 0 ended with status 1")

    with pytest.raises(DeviceError, match="cuda:3: encodes a test pattern with a wrong encoded_e"):
        unit_coder.check_coder(WritesNothing(), "cuda:3")
    with pytest.raises(DeviceError, match="cuda:3: encodes a test pattern with a wrong comparison"):
        unit_coder.check_coder(DecodesNothing(), "cuda:3")


def test_a_device_that_is_not_there_and_a_missing_triton_are_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DeviceError, match=r"cuda:7: torch .* sees \d+ GPUs, counted from 0"):
        unit_coder.coder_of("cuda:7")
    monkeypatch.setitem(sys.modules, "vllm_dfloat.kernels.dfloat11_encode", None)
    monkeypatch.delattr(vllm_dfloat.kernels, "dfloat11_encode")
    with pytest.raises(DeviceError, match=r"cpu: Triton cannot be imported .* --device cpu"):
        unit_coder.DeviceCoder(torch.device("cpu"))
