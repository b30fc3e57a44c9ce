"""Launch parameters: the entry that a device gets, and a check that every entry can be launched."""

import contextlib
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from vllm_dfloat.device import fused
from vllm_dfloat.kernels import configs, packed_matmul
from vllm_dfloat.kernels.configs import (
    CONFIGS,
    DEFAULT,
    INTERPRETED,
    LaunchConfig,
    config_for,
    config_of,
    override,
)
from vllm_dfloat.kernels.fast_product import LOW_BANDS, TALL_BANDS, Choice, DotShape, FastProduct

ROOT = Path(__file__).parents[2]
WARPS = (
    "dfloat11_num_warps",
    "count_num_warps",
    "dfloat11_encode_num_warps",
)
LAUNCHED = (
    "decode_tiles_per_program",
    "fused_gemv_tiles_per_program",
    "count_window_tiles_per_program",
    "count_tiles_per_program",
    "encode_tiles_per_program",
    "dfloat11_encode_tiles_per_program",
    "dfloat11_split_weights",
    *WARPS,
)


def test_a_name_goes_before_a_capability_and_a_longer_name_before_a_shorter_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: "H100" found in "H100 PCIe", whose memory is slower.
    by_name, longer, by_capability = (replace(DEFAULT, fused_max_rows=n) for n in (1, 2, 3))
    table = {"H100": by_name, "H100 PCIe": longer, (9, 0): by_capability}
    monkeypatch.setattr(configs, "CONFIGS", table)
    assert config_for("NVIDIA H100 80GB HBM3", (9, 0)) is by_name
    assert config_for("NVIDIA H100 PCIe", (9, 0)) is longer
    assert config_for("NVIDIA H200", (9, 0)) is by_capability
    assert config_for("NVIDIA of tomorrow", (12, 3)) is DEFAULT


def test_an_amd_gpu_is_not_taken_for_an_nvidia_gpu_of_the_same_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: an MI250, whose capability is (9, 0) in PyTorch, launched as a Hopper.
    table = {(9, 0): replace(DEFAULT, fused_max_rows=3)}
    monkeypatch.setattr(configs, "CONFIGS", table)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI250X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert configs._config_of.__wrapped__(torch.device("cuda")) is DEFAULT
    monkeypatch.setattr(torch.version, "hip", None)
    assert configs._config_of.__wrapped__(torch.device("cuda")) is table[9, 0]


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "a GPU of tomorrow"])
@pytest.mark.parametrize(("rows", "most"), [(28_672, 4), (6144, 4), (6143, 2), (4096, 2)])
def test_packed_matrices_of_few_rows_are_decoded_sooner(
    name: str, rows: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: 4 rows of activations for 4096 x 14336, for which decoding first was faster on an H100.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    with override(config_for(name, (9, 0))):
        assert fused.max_rows(torch.device("cpu"), rows, 4096) == most
        assert fused.max_rows(torch.device("cpu"), rows, 4100) == 0  # no multiple of 8


def test_a_device_that_is_not_cuda_gets_what_suits_the_interpreter() -> None:
    assert config_of(torch.device("cpu")) is INTERPRETED
    assert config_of(torch.device("meta")) is INTERPRETED


def test_overriding_ends_with_its_block_whatever_happens_in_it() -> None:
    # Bug caught: a candidate that cannot be launched, but whose parameters stay for the rest of the process.
    outer, inner = replace(DEFAULT, fused_max_rows=1), replace(DEFAULT, fused_max_rows=2)
    with override(outer):
        with contextlib.suppress(ZeroDivisionError), override(inner):
            assert config_of(torch.device("cpu")) is inner
            _ = 1 / 0
        assert config_of(torch.device("cpu")) is outer
    assert config_of(torch.device("cpu")) is INTERPRETED


def test_asking_for_a_cpu_initialises_no_cuda() -> None:
    code = (
        "import torch; from vllm_dfloat.kernels.configs import config_of; config_of(torch.device('cpu'));"
        "assert not torch.cuda.is_initialized()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=300).returncode == 0


@pytest.mark.parametrize(
    ("rows", "cols", "of_a_program", "warps"),
    [
        (16_320, 4096, 16, 2),
        (8192, 4096, 8, 2),
        (4096, 14_336, 8, 2),
        (4096, 14 * 128, 8, 2),
        (4096, 13 * 128, 8, 1),
        (14_336, 13 * 128, 16, 1),
    ],
)
def test_the_fewer_rows_the_more_warps_add_them_in_order_and_each_gets_whole_tiles(
    rows: int, cols: int, of_a_program: int, warps: int
) -> None:
    product = DEFAULT.fast_product
    shape = product.in_order_shape(rows, cols, 16, is_compiled=True)
    assert (shape.rows, shape.warps, shape.cols) == (of_a_program, warps, 128 * warps)
    assert product.in_order_shape(rows, cols, 16, is_compiled=True, most_warps=1).warps == 1


@pytest.mark.parametrize(
    ("rows", "num_x", "bands"),
    [
        (16_321, 1, LOW_BANDS),
        (28_672, 16, LOW_BANDS),
        (16_320, 16, None),
        (16_257, 17, TALL_BANDS),
        (16_256, 32, None),
        (16_257, 64, TALL_BANDS),
        (16_384, 256, TALL_BANDS),
    ],
)
def test_many_rows_of_activations_are_shared_by_bands_where_there_are_enough(
    rows: int, num_x: int, bands: DotShape | None
) -> None:
    shape = DEFAULT.fast_product.in_order_shape(rows, 4096, num_x, is_compiled=True)
    assert shape.in_order
    assert shape.has_bands == (bands is not None)
    assert bands is None or shape == replace(bands, in_order=True)


def test_more_rows_than_32_are_multiplied_in_order_only_where_bands_fill_the_device() -> None:
    product = FastProduct((Choice(256, TALL_BANDS, programs=96),))
    assert product.max_rows_in_order(16_257) == 256
    assert product.max_rows_in_order(16_256) == 32
    assert DEFAULT.fast_product.max_rows_in_order(16_257) == DEFAULT.fast_product.max_rows(16_257)
    assert FastProduct((Choice(8, TALL_BANDS, programs=96),)).max_rows_in_order(64) == 8


@pytest.mark.parametrize(("cols", "warps"), [(1024, 4), (7 * 128, 1)])
def test_a_table_may_choose_a_product_in_order_which_has_one_part(cols: int, warps: int) -> None:
    shape = DotShape(rows=8, cols=512, stages=1, warps=4, width=4, in_order=True)
    launched = FastProduct((Choice(8, shape, programs=4096),)).launch_shape(4096, cols, 8)
    assert launched == replace(shape, cols=128 * warps, warps=warps)


@pytest.mark.parametrize(
    "config",
    [DEFAULT, INTERPRETED, *CONFIGS.values()],
    ids=["default", "interpreted", *map(str, CONFIGS)],
)
def test_every_entry_can_be_launched(config: LaunchConfig) -> None:
    # Triton takes powers of two for shapes and warps, and 32 warps at most.
    for name in LAUNCHED:
        value = getattr(config, name)
        assert value > 0, name
        assert value & (value - 1) == 0, name
    assert max(getattr(config, name) for name in WARPS) <= 32
    assert config.decode_tiles_per_program <= 64
    assert 0 <= config.fused_max_rows <= packed_matmul.MAX_ROWS
    assert 0 <= config.fused_max_rows_if_large <= packed_matmul.MAX_ROWS
    assert config.group_decode_max_numel >= 0
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "fast_product"}
    assert all(type(value) in (int, bool) for value in values.values())
