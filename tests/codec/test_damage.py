"""A bit flip in any field of a compressed weight is an error with the tensor's name, in every reader."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from helpers import gaussian, same_bits, to_torch

from vllm_dfloat.codec.layout import PackedLayout
from vllm_dfloat.device import checksum, fused, groups, ops, packed_weight, unit_layout
from vllm_dfloat.device import unit_resident as units
from vllm_dfloat.errors import FormatError

NAME = "model.layers.3.mlp.down_proj"
SHAPE = 3, 2048  # three tiles; for other widths the fused kernel for many rows needs more programs
WEIGHT = to_torch(gaussian(*SHAPE))
IDS = torch.tensor([2, 0])
Packed = ops.PackedWeight


def activations(num_x: int) -> torch.Tensor:
    return torch.ones(num_x, SHAPE[1], dtype=torch.bfloat16)


def packed_sections(packed: Packed) -> dict[str, torch.Tensor]:
    lay = PackedLayout(*SHAPE, *packed.fields[1:])
    ends = (
        lay.sign_mantissa_offset,
        lay.lane_lengths_offset,
        lay.tile_starts_offset,
        lay.words_offset,
    )
    names = ("lut", "sign_mantissa", "lane_lengths", "tile_starts", "words")
    return dict(zip(names, packed.payload.tensor_split(ends), strict=True))


def unit_sections(packed: Packed) -> dict[str, torch.Tensor]:
    lay = unit_layout.UnitLayout(SHAPE[0] * SHAPE[1], *packed.fields[1:])
    ends = lay.positions_offset, lay.gaps_offset, lay.sign_mantissa_offset, lay.stream_offset
    names = ("tables", "positions", "gaps", "sign_mantissa", "stream")
    return dict(zip(names, packed.payload.tensor_split(ends), strict=True))


def unpack_block(packed: Packed) -> Sequence[torch.Tensor]:
    return groups.unpack([ops.pack(WEIGHT, "before"), packed])


# How a weight is made, its sections, and all functions that read and check it.
KERNELS: dict[str, tuple[str, Callable[[Packed], object]]] = {
    "decode": ("packed", ops.unpack),
    "rows": ("packed", lambda packed: ops.unpack_rows(packed, IDS)),
    "block": ("packed", unpack_block),
    "gemv": ("packed", lambda packed: fused.multiply(packed, activations(1))),
    "official": ("official", units.unpack),
    "official rows": ("official", lambda packed: units.unpack_rows(packed, IDS)),
}
LAYOUTS = {"packed": (ops.pack, packed_sections), "official": (units.pack, unit_sections)}
ON_CPU = ("decode", "rows", "block", "official", "official rows")
RUNS = [(kernel, "triton") for kernel in KERNELS] + [(kernel, "numba") for kernel in ON_CPU]


@pytest.mark.parametrize(("kernel", "backend"), RUNS)
def test_a_flipped_bit_in_any_field_ends_in_an_error_with_the_name(
    kernel: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a bit of a sign, a mantissa or a symbol contradicts nothing, and gives another weight.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    layout, read = KERNELS[kernel]
    pack, sections_of = LAYOUTS[layout]
    packed = pack(WEIGHT, NAME)
    assert not packed.is_raw
    rng = np.random.default_rng(len(kernel))
    fields = {**sections_of(packed), "desc": packed.desc.view(torch.uint8)}
    assert len(fields) == 6
    read(packed)
    for name, field in fields.items():
        at, bit = int(rng.integers(field.numel())), 1 << int(rng.integers(8))
        field[at] ^= bit
        with pytest.raises(FormatError, match=NAME.replace(".", r"\.")):
            pytest.fail(f"{name}, byte {at}, bit {bit}: {read(packed)}")
        field[at] ^= bit


@pytest.mark.parametrize("pack", [ops.pack, units.pack])
def test_a_flipped_bit_of_a_matrix_held_as_bf16_is_an_error(pack: Callable[..., Packed]) -> None:
    weight = to_torch(gaussian(3, 100))
    packed = pack(weight, NAME)
    assert packed.is_raw
    packed.payload[77] ^= 4
    unpack = ops.unpack if pack is ops.pack else units.unpack
    with pytest.raises(FormatError, match=rf"{NAME}: the 4096 packed bytes have checksum"):
        unpack(packed)
    packed.payload[77] ^= 4
    assert same_bits(unpack(packed), weight)


@pytest.mark.parametrize("pack", [ops.pack, units.pack])
def test_every_bit_of_the_descriptor_is_checked_before_it_is_followed(
    pack: Callable[..., Packed],
) -> None:
    # Bug caught: an address with a flipped bit is followed, and the process crashes.
    packed = pack(WEIGHT, NAME)
    unpack = ops.unpack if pack is ops.pack else units.unpack
    for word in range(ops.DESC_LENGTH):
        for bit in range(63):
            packed.desc[word] ^= 1 << bit
            with pytest.raises(FormatError, match=rf"{NAME}: descriptor .*; expected"):
                unpack(packed)
            packed.desc[word] ^= 1 << bit
    assert same_bits(unpack(packed), WEIGHT)


@pytest.mark.parametrize("pack", [ops.pack, units.pack])
@pytest.mark.parametrize("change", ["short", "long", "rows", "cols", "dtype"])
def test_sizes_that_do_not_fit_are_refused_before_decoding(
    pack: Callable[..., Packed], change: str
) -> None:
    packed = pack(WEIGHT, NAME)
    payload = packed.payload
    wrong = {
        "short": dict(payload=payload[:-4]),
        "long": dict(payload=torch.cat([payload, payload])),
        "rows": dict(rows=9000),
        "cols": dict(cols=9000),
        "dtype": dict(payload=payload.view(torch.int8)),
    }[change]
    unpack = ops.unpack if pack is ops.pack else units.unpack
    with pytest.raises(FormatError, match=rf"{NAME}: payload torch.u?int8 \[\d+\]; a matrix \["):
        unpack(dataclasses.replace(packed, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [ops.pack, units.pack])
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_a_payload_that_is_not_aligned_is_refused_and_its_clone_is_taken(
    pack: Callable[..., Packed], offset: int
) -> None:
    # Bug caught: a misaligned payload; kernels load 16 bytes at once, and on a GPU the fault ends the process.
    packed = pack(WEIGHT, NAME)
    memory = torch.empty(packed.payload.numel() + offset, dtype=torch.uint8)
    payload = memory[offset:].copy_(packed.payload)
    unpack = ops.unpack if pack is ops.pack else units.unpack
    refused = rf"{NAME}: payload at 0x[0-9a-f]+ on cpu; expected .* multiple of 16 bytes"
    described = dataclasses.replace(packed, payload=payload).described_in(packed.desc)
    with pytest.raises(FormatError, match=refused):
        unpack(described)
    with pytest.raises(FormatError, match=refused):
        described.to("cpu")
    with pytest.raises(FormatError, match=refused):
        packed_weight.make_descriptor(payload, packed.fields, packed.size, NAME)
    desc = packed_weight.make_descriptor(payload.clone(), packed.fields, packed.size, NAME)
    taken = dataclasses.replace(packed, payload=payload.clone(), desc=desc)
    assert same_bits(unpack(taken.described_in(desc)), WEIGHT)


def test_checksum_sees_flips_pairs_of_flips_and_words_that_changed_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checksum, "CHUNK_WORDS", 16)  # several chunks, the last one not full
    rng = np.random.default_rng(0)
    payload = torch.from_numpy(rng.integers(0, 256, 16 * 4 * 3 + 11, np.uint8))  # and half a word
    changed = []
    for at in range(payload.numel()):
        for bit in range(8):
            one = payload.clone()
            one[at] ^= 1 << bit
            changed.append(one)
    for _ in range(200):
        pair = payload.clone()
        for at in rng.choice(payload.numel(), 2, replace=False):
            pair[at] ^= 1 << int(rng.integers(8))
        words = payload.clone()
        i, j = rng.choice(payload.numel() // 4, 2, replace=False)
        view = words[: payload.numel() // 4 * 4].view(torch.int32)
        view[[i, j]] = view[[j, i]]
        changed += [pair, words]
    sums = {checksum.checksum(other) for other in [payload, *changed]}
    # All sums differ from each other too, except for pairs and words that were drawn twice.
    assert checksum.checksum(payload) in sums
    assert len(sums) == len({other.numpy().tobytes() for other in [payload, *changed]})
