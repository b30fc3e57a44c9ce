"""Small checks of the kernels of the official layout."""

from __future__ import annotations

import torch
from bench.checks.sizes import COLS, some_rows
from bench.kernels.decode import check_decode, check_rows
from bench.kernels.runs import InRuns
from bench.kernels.timing import WrongBitsError, expect_same_bits
from bench_setup import normal

from vllm_dfloat.device import unit_decode
from vllm_dfloat.device import unit_resident as units
from vllm_dfloat.device.unit_coder import DeviceCoder
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit


def official_unit(device: torch.device) -> None:
    weight = normal(12, COLS, device, seed=2)
    unit = as_unit(encode_unit([weight.cpu().view(torch.uint16).numpy().reshape(-1)], "w"), "w")
    expect_same_bits(unit_decode.decode_unit(unit, device), weight, "decode_dfloat11")


def official_encoder(device: torch.device) -> None:
    """Check the encoder as `compress` uses it: two members, and pieces with a partly filled last lane."""
    members = [normal(rows, COLS, device, seed=rows).cpu() for rows in (12, 1)]
    bits = [member.view(torch.uint16).numpy() for member in members]
    made, expected = encode_unit(bits, "w", DeviceCoder(device)), encode_unit(bits, "w")
    wrong = [field for field in expected if (made[field] != expected[field]).any()]
    if wrong:
        raise WrongBitsError(f"encode_dfloat11: {', '.join(wrong)}")


def official_held(device: torch.device) -> None:
    weight = normal(12, COLS, device, seed=2)
    held = units.pack(weight, "w")
    check_decode(held, weight, "decode_resident", units.decode)
    check_rows(held, weight, some_rows(weight), "decode_resident_rows", units.decode_rows)


def official_run(device: torch.device) -> None:
    """Check runs of rows, which begin and end within blocks of the stream."""
    weight = normal(100, COLS, device, seed=7)
    InRuns("dfloat11", weight).check(weight, 40, "decode_resident_run")
