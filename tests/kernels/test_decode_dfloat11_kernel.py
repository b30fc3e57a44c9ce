"""The two-phase kernel, in Triton's interpreter: equal to the CPU decoder, and within its bounds on any bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dfloat11_helpers import VECTORS, edge_originals, vector_units
from guard_pages import run_python
from helpers import unlike

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.dfloat11 import format
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import FormatError
from vllm_dfloat.kernels import dfloat11_decode as kernel

EDGE_UNITS = vector_units("edge-good")


def device_tensors(unit: Unit) -> list[torch.Tensor]:
    """Return copies of the kernel's inputs, in its order."""
    arrays = (unit.stream, unit.sign_mantissa, unit.tables, unit.positions, unit.gaps)
    return [torch.from_numpy(array.copy()) for array in arrays]


def run(inputs: list[torch.Tensor], poison: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode to poisoned memory with a margin around it; return the weights and the status."""
    numel, blocks = inputs[1].numel(), inputs[3].numel() - 1
    margin = 4096
    memory = np.full(numel + 2 * margin, poison, np.uint16)
    words = np.full(blocks + 2, -7, np.int32)
    out = torch.from_numpy(memory).view(torch.bfloat16)[margin : margin + numel]
    kernel.decode(*inputs, out, torch.from_numpy(words)[1:-1])
    assert (memory[:margin] == poison).all(), "wrote before the output"
    assert (memory[margin + numel :] == poison).all(), "wrote behind the output"
    assert words[0] == words[-1] == -7
    return memory[margin : margin + numel], words[1:-1]


@pytest.mark.parametrize("name", EDGE_UNITS)
def test_kernel_returns_the_original_bits_of_every_edge_unit(name: str) -> None:
    expected = edge_originals()[name.removeprefix("edge-good/")]
    found, status = run(device_tensors(EDGE_UNITS[name]), unlike(expected))
    assert np.array_equal(found, expected)
    assert not status.any()


@pytest.mark.parametrize("vector", ["llama-tiny-single", "qwen3-tiny-tied", "phi3-tiny-fused"])
def test_kernel_equals_the_cpu_decoder_on_a_unit_of_each_model(vector: str) -> None:
    # The smallest unit of each: the interpreter needs a third of a second per block.
    units = open_checkpoint(VECTORS / f"{vector}-df11").units.values()
    unit = first_blocks(min(units, key=lambda entry: entry.num_weights).load(), 3)
    expected = decode_unit(unit)
    found, status = run(device_tensors(unit), unlike(expected))
    assert np.array_equal(found, expected)
    assert not status.any()


def first_blocks(unit: Unit, count: int) -> Unit:
    """Return the unit reduced to its first blocks, as if it had no others."""
    if unit.num_blocks <= count:
        return unit
    numel = int(unit.positions[count])
    return Unit(
        unit.name, unit.where, unit.stream[: 4096 * count + 4], unit.sign_mantissa[:numel],
        np.append(unit.gaps[: 320 * count], np.zeros(320, np.uint8)),
        np.append(unit.positions[: count + 1], numel), np.array([0, numel]), unit.luts, unit.tables,
    )  # fmt: skip


def test_missing_code_gap_and_count_each_end_with_their_status_bit() -> None:
    unit = EDGE_UNITS["edge-good/prime4099"]
    for index, change, bit in (
        (2, lambda tables: tables[0].fill_(0), format.STATUS_BAD_CODE),
        (4, lambda gaps: gaps[1].bitwise_xor_(0x20), format.STATUS_GAP),
    ):
        inputs = device_tensors(unit)
        change(inputs[index])
        _, status = run(inputs, 0xFFFF)
        assert status[0] & bit == bit
    unit = EDGE_UNITS["edge-good/all_0_to_239"]
    for shift in (-1, 1):
        inputs = device_tensors(unit)
        inputs[3][1] += shift
        # Weights of the next block are then misplaced as well.
        assert run(inputs, 0xFFFF)[1].tolist() == [format.STATUS_COUNT, format.STATUS_COUNT, 0]


def test_stream_cut_within_its_last_code_ends_with_a_status_bit() -> None:
    # The code starts in byte 239 and ends in byte 240, which is missing.
    inputs = device_tensors(EDGE_UNITS["edge-good/tail_straddle_window_aligned"])
    inputs[0] = inputs[0][:240].clone()
    assert run(inputs, 0xFFFF)[1].tolist() == [format.STATUS_BAD_CODE + format.STATUS_COUNT]


@pytest.mark.parametrize(("name", "flips"), [("odd77", 6), ("prime4099", 4), ("all_0_to_239", 4)])
def test_kernel_and_cpu_decoder_agree_on_what_is_damaged(name: str, flips: int) -> None:
    # Bug caught: a kernel that accepts a damaged block which the CPU decoder refuses.
    unit = EDGE_UNITS[f"edge-good/{name}"]
    rng = np.random.default_rng(0)
    for _ in range(flips):
        stream = unit.stream.copy()
        stream[rng.integers(0, stream.size)] ^= 1 << rng.integers(0, 8)
        damaged = Unit(
            unit.name, unit.where, stream, unit.sign_mantissa, unit.gaps, unit.positions,
            unit.splits, unit.luts, unit.tables,
        )  # fmt: skip
        found, status = run(device_tensors(damaged), 0xFFFF)
        try:
            expected = decode_unit(damaged)
        except FormatError:
            assert status.any()
        else:
            assert not status.any()
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("index", range(5))
def test_random_bytes_in_any_input_end_without_leaving_the_tensors(index: int) -> None:
    rng = np.random.default_rng(index)
    inputs = device_tensors(EDGE_UNITS["edge-good/rows18"])
    target = inputs[index].view(torch.uint8).numpy()
    for _ in range(2):
        target[...] = rng.integers(0, 256, target.shape)
        run(inputs, 0xFFFF)


def test_inputs_of_a_wrong_size_are_refused_before_the_launch() -> None:
    unit = EDGE_UNITS["edge-good/prime4099"]
    names = ("stream", "sign_mantissa", "tables", "positions", "gaps")
    for index, name in enumerate(names):
        inputs = device_tensors(unit)
        inputs[index] = inputs[index].to(torch.float64)
        with pytest.raises(ValueError, match=f"^{name}: "):
            run(inputs, 0)
    for index in (3, 4):
        inputs = device_tensors(unit)
        inputs[index] = inputs[index][:-1]
        status = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(ValueError, match=f"^{names[index]}: "):
            kernel.decode(*inputs, torch.zeros(4099, dtype=torch.bfloat16), status)
    with pytest.raises(ValueError, match=r"^out: "):
        kernel.decode(*device_tensors(unit), torch.zeros(4098, dtype=torch.bfloat16), status)
    with pytest.raises(ValueError, match=r"^out: "):
        kernel.decode(*device_tensors(unit), torch.zeros(4099), status)


_GUARDED = """
import numpy as np, torch
import test_decode_dfloat11_kernel as tests
from guard_pages import guarded
from vllm_dfloat.kernels import dfloat11_decode as kernel

for name in ("odd77", "tail_window_aligned", "rows18"):
    unit = tests.EDGE_UNITS["edge-good/" + name]
    inputs = [guarded(t.numpy()) for t in tests.device_tensors(unit)]
    out = guarded(np.zeros(unit.num_weights, np.int16))
    status = guarded(np.full(unit.num_blocks, 9, np.int32))
    kernel.decode(*inputs, out, status)
    assert not status.any()
    assert np.array_equal(out.numpy().view(np.uint16), tests.edge_originals()[name])
    rng = np.random.default_rng(0)
    inputs[0].numpy()[...] = rng.integers(0, 256, unit.stream.size)
    inputs[2].view(torch.uint8).numpy()[...] = rng.integers(0, 256, unit.tables.shape[:1] + (1024,))
    inputs[3].numpy()[1:] = rng.integers(-(2**63), 2**63, unit.num_blocks)
    kernel.decode(*inputs, out, status)
print("done")
"""


def test_no_access_reaches_the_byte_behind_any_tensor() -> None:
    here = f"import sys; sys.path.append({str(Path(__file__).parent)!r})"
    done = run_python(here + _GUARDED, {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
