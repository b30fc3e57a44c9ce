"""Matrices held in the official layout: both backends, damage, and the sizes that a launch depends on."""

import os
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from dfloat11_helpers import edge_originals
from guard_pages import run_python
from helpers import Bits, gaussian, hard_matrices, same_bits, to_torch, unlike

from vllm_dfloat.device import ops, unit_layout
from vllm_dfloat.device import unit_resident as units
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.kernels import dfloat11_resident as kernels

EDGE = {name: bits.reshape(1, -1) for name, bits in edge_originals().items()}
HARD = {**hard_matrices(), **EDGE}
CODED = {  # large enough, and with few enough exponents, for coding to make them smaller
    "thin rows": gaussian(3000, 4),
    "37 rows of 333": gaussian(37, 333),
    "several blocks": gaussian(150, 204),
    "one bit a code": np.where(np.arange(33_000) % 997, 0x3C12, 0x3D80).astype(np.uint16)[None],
    "zeros alone": np.zeros((64, 64), np.uint16),
}
# The interpreter takes a third of a second per block: numba covers these.
SLOW = [name for name, bits in HARD.items() if bits.size > 70_000]


@pytest.fixture(params=["numba", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=request.param):
        yield request.param


def buffers(rows: int, cols: int, poison: int) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full((ops.padded_numel(rows, cols),), poison, dtype=torch.uint16)
    status = torch.full((ops.num_tiles(rows, cols),), -1, dtype=torch.int32)
    return out.view(torch.bfloat16), status


def decode_with_op(held: units.UnitWeight, poison: int) -> torch.Tensor:
    out, status = buffers(held.rows, held.cols, poison)
    units.decode(held.desc, held.rows, held.cols, out, status)
    assert not status.any()
    return out[: held.rows * held.cols].view(held.rows, held.cols)


@pytest.mark.parametrize("name", [*HARD, *CODED])
def test_op_decodes_every_hard_matrix(name: str, backend: str) -> None:
    if backend == "triton" and name in SLOW:
        pytest.skip("minutes in the interpreter")
    bits = CODED[name] if name in CODED else HARD[name]
    held = units.pack(to_torch(bits), name)
    if name in CODED:
        assert not held.is_raw
    assert same_bits(decode_with_op(held, unlike(bits)), to_torch(bits))


@pytest.mark.parametrize("name", ["thin rows", "37 rows of 333", "exponents 240 to 255"])
def test_op_returns_the_rows_asked_for(name: str, backend: str) -> None:
    bits = CODED[name] if name in CODED else HARD[name]
    held = units.pack(to_torch(bits), name)
    rows, cols = bits.shape
    ids = torch.tensor([rows - 1, 0, rows // 2])
    found = units.decode_rows(held.desc, ids, rows, cols)
    assert same_bits(found, to_torch(bits[ids.numpy()]))


def test_rows_of_many_short_blocks_are_complete(backend: str) -> None:
    # Bug caught: too few programs for a row of long codes: its blocks hold few weights, so it touches many.
    symbols = np.repeat(np.arange(100, 164, dtype=np.uint16), 8)
    tail = np.tile(symbols, 40)[:20_000]  # six bits a code and more
    bits = np.concatenate([tail << 7, np.full(30_000, 90 << 7, np.uint16)]).reshape(5, 10_000)
    held = units.pack(to_torch(bits), "w")
    assert not held.is_raw
    found = units.decode_rows(held.desc, torch.tensor([1, 4]), *bits.shape)
    assert same_bits(found, to_torch(bits[[1, 4]]))


def test_a_row_outside_the_matrix_is_refused_on_a_cpu_and_read_as_the_nearest_by_the_kernel() -> (
    None
):
    bits = CODED["37 rows of 333"]
    held = units.pack(to_torch(bits), "w")
    with pytest.raises(IndexError, match="rows -1 to 37 asked for; the matrix has 37"):
        units.decode_rows(held.desc, torch.tensor([-1, 37]), *bits.shape)
    out = torch.empty(2, 333, dtype=torch.bfloat16)
    kernels.decode_resident_rows(held.desc, torch.tensor([-1, 37]), *bits.shape, out)
    assert same_bits(out, to_torch(bits[[0, 36]]))


def test_payload_holds_the_official_tensors_and_little_else() -> None:
    bits = gaussian(1024, 1024)
    held = units.pack(to_torch(bits), "w")
    official = encode_unit([bits], "w")
    payload = held.payload.numpy().tobytes()
    for field in ("encoded_exponent", "sign_mantissa", "gaps"):
        assert official[field].tobytes() in payload, field
    # Positions of 8 bytes instead of 4, tables of 4 bytes an entry instead of 1, and alignment.
    stored = sum(tensor.nbytes for tensor in official.values())
    extra = 4 * official["output_positions"].size // 4 + 3 * official["luts"].size
    assert stored - 256 <= held.payload.numel() <= stored + extra + 64
    assert held.num_bytes == held.payload.numel() + 32


def test_descriptor_has_the_length_that_graphs_were_traced_with() -> None:
    # Bug caught: descriptors of different lengths; vLLM reloads into the existing parameters.
    lengths = {units.pack(to_torch(bits)).desc.shape for bits in (gaussian(1, 1), gaussian(99, 99))}
    assert lengths == {(ops.DESC_LENGTH,)}


def test_a_launch_depends_on_the_shape_alone_and_is_large_enough() -> None:
    # The worst case that is still coded: over 7 bits per code.
    symbols = np.arange(60, 188, dtype=np.uint16)
    bits = np.random.default_rng(0).choice(symbols, 40_000).astype(np.uint16)[None] << 7
    held = units.pack(to_torch(bits), "w")
    assert not held.is_raw
    assert as_unit(encode_unit([bits], "w"), "w").num_blocks == 9 < -(-bits.size // 4096)
    out, status = buffers(*bits.shape, unlike(bits))
    kernels.decode_resident(held.desc, bits.size, out, status)
    assert not status.any()
    assert same_bits(out[: bits.size].view(*bits.shape), to_torch(bits))


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4).bfloat16()]
)
def test_what_is_not_a_bf16_matrix_is_refused_by_name(weight: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match=r"layers.0.w: torch\..* expected a BF16 matrix"):
        units.pack(weight, "layers.0.w")


def test_unpack_reports_a_corrupt_payload_by_name() -> None:
    held = units.pack(to_torch(gaussian(150, 204)), "layers.0.w")
    assert same_bits(units.unpack(held), to_torch(gaussian(150, 204)))
    held.payload[-2000:-1000] ^= 0x5A
    with pytest.raises(FormatError, match=r"layers\.0\.w: block 1 ended with status"):
        units.unpack(held)


def damaged(held: units.UnitWeight, rng: np.random.Generator, flips: int) -> None:
    payload = held.payload.numpy()
    for position in rng.integers(0, payload.size, flips):
        payload[position] ^= 1 << rng.integers(0, 8)


def test_flipped_bits_anywhere_end_and_never_read_outside_on_a_cpu() -> None:
    bits = gaussian(150, 204)
    rng = np.random.default_rng(1)
    reported = 0
    for _ in range(200):
        held = units.pack(to_torch(bits), "w")
        damaged(held, rng, int(rng.integers(1, 9)))
        out, status = buffers(150, 204, 0x1234)
        units.decode(held.desc, 150, 204, out, status)
        assert (status >= 0).all()
        reported += bool(status.any())
    assert reported > 50


@pytest.mark.parametrize("section", ["tables", "positions", "gaps", "sign_mantissa", "stream"])
def test_random_bytes_in_any_section_end_without_leaving_payload_or_output(
    section: str, backend: str
) -> None:
    bits = gaussian(70, 204)
    rng = np.random.default_rng(2)
    for _ in range(2):
        held = units.pack(to_torch(bits), "w")
        lay = unit_layout.UnitLayout(bits.size, *held.fields[1:])
        part = getattr(unit_layout.sections_of(held.payload.numpy(), lay), section).reshape(-1)
        part.view(np.uint8)[:] = rng.integers(0, 256, part.nbytes)
        margin = 4096
        memory = torch.full((bits.size + 2 * margin,), 0x1234, dtype=torch.uint16)
        out = memory[margin : margin + bits.size].view(torch.bfloat16)
        status = torch.full((ops.num_tiles(70, 204),), -1, dtype=torch.int32)
        units.decode(held.desc, 70, 204, out, status)
        assert (status >= 0).all()
        assert bool(status.any()) or section == "sign_mantissa"
        assert (memory[:margin] == 0x1234).all()
        assert (memory[margin + bits.size :] == 0x1234).all()


def test_the_kernel_reports_damage_of_the_stream_as_the_cpu_decoder_does() -> None:
    # Bug caught: a kernel that accepts a damaged block which the CPU decoder refuses.
    bits: Bits = gaussian(70, 204)
    rng = np.random.default_rng(3)
    for _ in range(4):
        held = units.pack(to_torch(bits), "w")
        held.payload[-int(rng.integers(1, 2000))] ^= 1 << int(rng.integers(0, 8))
        results = []
        for name in ("numba", "triton"):
            with mock.patch.dict(os.environ, VLLM_DFLOAT_BACKEND=name):
                out, status = buffers(70, 204, 0x1234)
                units.decode(held.desc, 70, 204, out, status)
                results.append((bool(status.any()), out))
        assert results[0][0] == results[1][0]
        if not results[0][0]:
            assert same_bits(results[0][1], results[1][1])


_GUARDED = """
import dataclasses, itertools, os
import numpy as np, torch
from guard_pages import guarded
from helpers import gaussian, to_torch
from vllm_dfloat.device import ops, unit_resident as units
from vllm_dfloat.errors import FormatError

rows, cols = 45, 204  # the last program has fewer weights than the others
seeds = (gaussian(rows, cols, seed) for seed in itertools.count())
held, bits = next((h, b) for b in seeds if not (h := units.pack(to_torch(b))).payload.numel() % 16)
assert not held.is_raw
payload, desc = guarded(held.payload.numpy()), guarded(held.desc.numpy())
held = dataclasses.replace(held, payload=payload).described_in(desc)
out = guarded(np.zeros(rows * cols, np.uint16)).view(torch.bfloat16)
status = guarded(np.full(ops.num_tiles(rows, cols), 9, np.int32))
ids = guarded(np.array([0, rows - 1], np.int64))

def run(check):
    for backend in ("numba", "triton"):
        os.environ["VLLM_DFLOAT_BACKEND"] = backend
        units.launch_decode(desc, rows, cols, out, status)  # out does not lie on 16 bytes
        assert not check or not status.any()
        assert not check or np.array_equal(out.view(torch.uint16).numpy().reshape(rows, cols), bits)
        try:
            found = units.decode_rows(desc, ids, rows, cols)
        except FormatError:
            assert not check
        else:
            assert not check or np.array_equal(found.view(torch.uint16).numpy(), bits[[0, -1]])

run(True)
rng = np.random.default_rng(0)
for share in (0.001, 0.01, 1.0):
    hit = rng.random(payload.numel()) < share
    payload.numpy()[hit] = rng.integers(0, 256, int(hit.sum()))
    run(False)
print("done")
"""


def test_no_access_reaches_the_byte_behind_payload_or_output() -> None:
    done = run_python(_GUARDED, {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
