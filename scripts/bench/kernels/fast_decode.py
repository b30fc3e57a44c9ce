"""Measure the fast layout against copies of the same bytes: decode whole matrices and chosen rows, and encode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench.kernels.decode import NUM_IDS, SIZES, TABLE, copy_call
from bench.kernels.timing import (
    FLOOR,
    Bench,
    Call,
    WrongBitsError,
    expect_no_status,
    expect_same_bits,
)
from bench_setup import nan_memory, normal, poisoned

from vllm_dfloat.device import fast_encode, fast_ops


def run(bench: Bench) -> None:
    for rows, cols in bench.of_sizes(SIZES, [(8, 700)]):
        if bench.begin("fast", f"{rows} x {cols}"):
            _decode(bench, rows, cols)
    if bench.sizes == "first":
        return
    rows, cols = bench.pick(TABLE, (40, 300))
    for num_ids in bench.pick(NUM_IDS, [1]):
        if bench.begin("fast", f"{num_ids} of {rows} x {cols}"):
            _rows(bench, rows, cols, num_ids)


def pack(weight: torch.Tensor) -> fast_ops.FastWeight:
    fast = fast_ops.pack(weight, "w")
    if fast is None:
        raise WrongBitsError(f"{list(weight.shape)}: takes 14 bits per weight or more")
    return fast


def buffers(fast: fast_ops.FastWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an output filled with NaN, and status words, for a matrix."""
    device, tiles = fast.desc.device, fast_ops.num_tiles(fast.rows, fast.cols)
    status = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    return poisoned(fast.rows * fast.cols, device), status


def check_decode(
    fast: fast_ops.FastWeight,
    weight: torch.Tensor,
    what: str,
    decode: Callable[..., None] = fast_ops.decode,
) -> None:
    """Raise WrongBitsError unless a buffer of NaN is filled with the bits of `weight`."""
    out, status = buffers(fast)
    decode(fast.desc, fast.rows, fast.cols, out, status)
    expect_no_status(status, what)
    expect_same_bits(out, weight, what)


def check_run(
    fast: fast_ops.FastWeight,
    weight: torch.Tensor,
    first: int,
    count: int,
    what: str,
    decode_run: Callable[..., None] = fast_ops.launch_decode_run,
) -> None:
    """Raise WrongBitsError unless a buffer of NaN is filled with `count` rows of `weight` from row `first` on."""
    device, tiles = fast.desc.device, fast_ops.num_tiles(count, fast.cols)
    out = poisoned(count * fast.cols, device)
    status = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    decode_run(fast.desc, fast.rows, fast.cols, first, count, out, status)
    expect_no_status(status, what)
    expect_same_bits(out, weight[first : first + count], what)


def _decode(bench: Bench, rows: int, cols: int) -> None:
    case, numel = f"{rows} x {cols}", rows * cols
    weight = normal(rows, cols, bench.device)
    fast = pack(weight)
    moved = fast.num_bytes + 2 * numel
    num_sets = bench.num_sets(moved)
    held = [fast] + [pack(weight) for _ in range(num_sets - 1)]
    for one in held:
        bench.compare(check_decode, one, weight, f"fast {case}")
    outs = [buffers(one) for one in held]
    calls: dict[str, Call] = {
        FLOOR: copy_call(bench, moved // 2, num_sets),
        "fast_decode": lambda i: fast_ops.decode(held[i].desc, rows, cols, *outs[i]),
        "fast_encode": lambda i: fast_encode.encode(weight),
    }
    bits = {"bits_per_weight": round(8 * fast.num_bytes / numel, 3)}
    bench.measure("fast", case, calls, num_sets, 2 * numel, {"fast_decode": bits})


def check_rows(
    fast: fast_ops.FastWeight,
    weight: torch.Tensor,
    ids: torch.Tensor,
    what: str,
    decode_rows: Callable[..., torch.Tensor] = fast_ops.decode_rows,
) -> None:
    """Raise WrongBitsError unless rows `ids` are those of `weight`."""
    with nan_memory():
        found = decode_rows(fast.desc, ids, fast.rows, fast.cols)
    expect_same_bits(found, weight[ids], what)


def _rows(bench: Bench, rows: int, cols: int, num_ids: int) -> None:
    table = normal(rows, cols, bench.device)
    fast = pack(table)
    generator = torch.Generator().manual_seed(num_ids)
    num_sets = bench.pick(8, 1)
    picks = [torch.randint(rows, (num_ids,), generator=generator) for _ in range(num_sets)]
    ids = [pick.to(bench.device) for pick in picks]
    case = f"{num_ids} of {rows} x {cols}"
    for pick in ids:
        bench.compare(check_rows, fast, table, pick, f"fast_rows {case}")
    calls: dict[str, Call] = {
        "look-up in BF16": lambda i: torch.index_select(table, 0, ids[i]),
        "fast_rows": lambda i: fast_ops.decode_rows(fast.desc, ids[i], rows, cols),
    }
    bench.measure("fast", case, calls, num_sets, 2 * num_ids * cols)
