"""Small checks of the kernels of the packed layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bench.checks.sizes import COLS, ROWS, some_rows
from bench.kernels.decode import check_decode, check_rows, device_encoded
from bench.kernels.fused import check_fused
from bench.kernels.groups import Group
from bench.kernels.runs import InRuns
from bench.kernels.timing import expect_same_bits
from bench_setup import nan_memory, normal

from vllm_dfloat.codec import layout
from vllm_dfloat.device import experts, fused, ops
from vllm_dfloat.kernels import packed_matmul as kernels


def packed_decode(device: torch.device) -> None:
    weight = normal(ROWS, COLS, device)
    check_decode(ops.pack(weight, "w"), weight, "decode", ops.decode)


def packed_run(device: torch.device) -> None:
    """Check runs of rows, the last of which ends within a tile."""
    weight = normal(300, 80, device, seed=6)
    InRuns("packed", weight).check(weight, 128, "decode_run")


def packed_rows(device: torch.device) -> None:
    """Check rows without a status, as for an embedding look-up, and with a status word per tile."""
    weight = normal(ROWS, COLS, device)
    packed, ids = ops.pack(weight, "w"), some_rows(weight)
    check_rows(packed, weight, ids, "decode_rows", ops.decode_rows)
    with nan_memory():
        found = ops.unpack_rows(packed, ids)
    expect_same_bits(found, weight[ids], "unpack_rows")


def packed_group(device: torch.device) -> None:
    """Check a group with members that end within a program, and one of a single weight."""
    shapes = [(ROWS, COLS), (1, 1), (12, 700)]
    Group([normal(*shape, device, seed=i) for i, shape in enumerate(shapes)]).check("decode_group")


def packed_experts(device: torch.device) -> None:
    """Check chosen experts, which share tiles with others: marked from ids on the device, then decoded."""
    weight = normal(3 * ROWS, COLS, device, seed=2)
    packed = ops.pack(weight, "w13")
    out = torch.full((packed.size * 2048,), torch.nan, dtype=torch.bfloat16, device=device)
    status = torch.empty(packed.size, dtype=torch.int32, device=device)
    chosen = torch.empty(3, dtype=torch.int32, device=device)
    experts.mark_chosen(torch.tensor([[2, -1, 5], [2, 0, 2]], device=device), None, chosen)
    experts.decode_chosen(packed.desc, 3, ROWS, COLS, chosen, out, status)
    found = out[: weight.numel()].view(3, ROWS, COLS)
    for expert in (0, 2):
        expect_same_bits(found[expert], weight.view(3, ROWS, COLS)[expert], "decode_chosen")
    shared = set(status.tolist())
    if chosen.tolist() != [1, 0, 1] or shared != {0, experts.STATUS_SKIPPED}:
        raise RuntimeError(f"chosen {chosen.tolist()}, status words {sorted(shared)}")


def encoder(device: torch.device) -> None:
    weight = normal(ROWS, COLS, device, seed=1)
    check_decode(device_encoded(weight), weight, "encode", ops.decode)


def fused_product(device: torch.device, cols: int, num_x: int) -> None:
    weight, x = normal(5, cols, device, seed=cols), normal(num_x, cols, device, seed=num_x)
    check_fused(ops.pack(weight, "w"), weight, x, f"fused, {num_x} rows, {cols} columns")


def fused_products(device: torch.device) -> dict[str, Callable[[], None]]:
    """Return a check per fused kernel: for each compiled number of rows and each number of segments."""
    eighth = layout.TILE_WEIGHTS // 8
    supported = [n * eighth for n in range(1, 17) if kernels.is_supported(n * eighth)]
    columns = {kernels.num_segments(cols): cols for cols in reversed(supported)}
    num_rows = fused.compiled_for(kernels.MAX_ROWS)
    if device.type == "cpu":  # seconds each in the interpreter
        columns, num_rows = {1: columns[1]}, [1]
    return {
        f"fused, {num_x} rows, {segments} segments": partial(fused_product, device, cols, num_x)
        for num_x in reversed(num_rows)
        for segments, cols in sorted(columns.items(), reverse=True)
    }
