"""Measure the packed layout against copies of the same bytes: decode whole matrices and chosen rows, and encode."""

from __future__ import annotations

from typing import Any

import torch
from bench.kernels.timing import FLOOR, Bench, Call, expect_no_status, expect_same_bits
from bench_setup import copy_of, nan_memory, normal, poisoned

from vllm_dfloat.device import ops, packed_encode
from vllm_dfloat.device.checksum import checksum
from vllm_dfloat.device.packed_weight import make_descriptor

TABLE = (128_256, 4096)  # embeddings and LM head of Llama 3.1 8B
# The most important sizes come first: time may run out.
SIZES = [
    (4096, 4096), (14_336, 4096), TABLE, (28_672, 4096), (16_384, 16_384), (1024, 1024),
    (2048, 2048), (8192, 8192), (16_384, 53_248),
]  # fmt: skip
NUM_IDS = [1, 256, 4096, 16]
ENCODED = [(4096, 4096), (28_672, 4096), (16_384, 16_384)]
MOST_PINNED_BYTES = 1 << 29


def run(bench: Bench) -> None:
    for rows, cols in bench.of_sizes(SIZES, [(8, 700)]):
        if bench.begin("decode", f"{rows} x {cols}"):
            _decode(bench, rows, cols)


def run_rows(bench: Bench) -> None:
    rows, cols = bench.pick(TABLE, (40, 300))
    if not bench.begin("decode_rows", f"{rows} x {cols}"):
        return
    table = normal(rows, cols, bench.device)
    packed = ops.pack(table, "table")
    for num_ids in bench.pick(NUM_IDS, [1]):
        if bench.begin("decode_rows", f"{num_ids} of {rows} x {cols}"):
            _rows(bench, table, packed, num_ids)


def run_encode(bench: Bench) -> None:
    for rows, cols in bench.of_sizes(ENCODED, [(8, 700)]):
        if bench.begin("encode", f"{rows} x {cols}"):
            _encode(bench, rows, cols)


def buffers(packed: ops.PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an output filled with NaN, and status words, for a matrix."""
    device = packed.desc.device
    num_tiles = ops.num_tiles(packed.rows, packed.cols)
    status = torch.full((num_tiles,), -1, dtype=torch.int32, device=device)
    return poisoned(ops.padded_numel(packed.rows, packed.cols), device), status


def check_decode(packed: ops.PackedWeight, weight: torch.Tensor, what: str, decode: Any) -> None:
    """Raise WrongBitsError unless `decode` fills a buffer of NaN with the bits of `weight`."""
    out, status = buffers(packed)
    decode(packed.desc, packed.rows, packed.cols, out, status)
    expect_no_status(status, what)
    expect_same_bits(out[: weight.numel()], weight, what)


def check_rows(
    packed: ops.PackedWeight, weight: torch.Tensor, ids: torch.Tensor, what: str, decode_rows: Any
) -> None:
    """Raise WrongBitsError unless `decode_rows` gives rows `ids` of `weight`."""
    with nan_memory():
        found = decode_rows(packed.desc, ids, packed.rows, packed.cols)
    expect_same_bits(found, weight[ids], what)


def _decode(bench: Bench, rows: int, cols: int) -> None:
    case, numel = f"{rows} x {cols}", rows * cols
    weight = normal(rows, cols, bench.device)
    packed = ops.pack(weight, "w")
    moved = packed.num_bytes + 2 * numel
    num_sets = bench.num_sets(moved)
    held = [packed] + [copy_of(packed) for _ in range(num_sets - 1)]
    for one in held:
        bench.compare(check_decode, one, weight, f"decode {case}", ops.decode)
    outs = [buffers(one) for one in held]
    calls: dict[str, Call] = {
        FLOOR: copy_call(bench, moved // 2, num_sets),
        "decode": lambda i: ops.decode(held[i].desc, rows, cols, *outs[i]),
    }
    if bench.is_gpu and 2 * numel <= MOST_PINNED_BYTES:
        host = torch.empty(numel, dtype=torch.bfloat16, pin_memory=True)
        calls["pinned host to device"] = lambda i: outs[i][0][:numel].copy_(host, non_blocking=True)
    else:
        reason = "over 512 MiB" if bench.is_gpu else "needs a GPU"
        bench.skip("decode", case, "pinned host to device", reason)
    bits = {"bits_per_weight": round(8 * packed.num_bytes / numel, 3)}
    bench.measure("decode", case, calls, num_sets, 2 * numel, {"decode": bits})


def copy_call(bench: Bench, num_bytes: int, num_sets: int) -> Call:
    """Return a call that copies `num_bytes` bytes on the device: it reads and writes each byte once."""
    make = lambda: [  # noqa: E731 (two lists of the same kind)
        torch.zeros(num_bytes, dtype=torch.uint8, device=bench.device) for _ in range(num_sets)
    ]
    sources, targets = make(), make()
    return lambda i: targets[i].copy_(sources[i])


def _rows(bench: Bench, table: torch.Tensor, packed: ops.PackedWeight, num_ids: int) -> None:
    rows, cols = table.shape
    num_sets = bench.pick(8, 1)
    generator = torch.Generator().manual_seed(num_ids)
    picks = [torch.randint(rows, (num_ids,), generator=generator) for _ in range(num_sets)]
    ids = [pick.to(bench.device) for pick in picks]
    case = f"{num_ids} of {rows} x {cols}"
    for pick in ids:
        bench.compare(check_rows, packed, table, pick, f"decode_rows {case}", ops.decode_rows)
    calls: dict[str, Call] = {
        "look-up in BF16": lambda i: torch.index_select(table, 0, ids[i]),
        "decode_rows": lambda i: ops.decode_rows(packed.desc, ids[i], rows, cols),
    }
    bench.measure("decode_rows", case, calls, num_sets, 2 * num_ids * cols)


def device_encoded(weight: torch.Tensor) -> ops.PackedWeight:
    """Encode a matrix with the GPU encoder, interpreted on a CPU; ops.pack would use the CPU encoder there."""
    lay, payload = packed_encode.encode(weight, "w")
    fields = (ops.KIND_RAW if lay.is_raw else ops.KIND_PACKED, lay.num_words, lay.code_bits)
    desc = make_descriptor(payload, fields, lay.num_tiles)
    rest = fields, checksum(payload)
    return ops.PackedWeight(payload, desc, *weight.shape, "w", *rest)


def _encode(bench: Bench, rows: int, cols: int) -> None:
    case, numel = f"{rows} x {cols}", rows * cols
    weight = normal(rows, cols, bench.device)
    packed = device_encoded(weight)
    bench.compare(check_decode, packed, weight, f"encode {case}", ops.decode)
    calls: dict[str, Call] = {
        FLOOR: copy_call(bench, (2 * numel + packed.num_bytes) // 2, 1),
        "encode": lambda i: packed_encode.encode(weight, "w"),
    }
    bits = {"bits_per_weight": round(8 * packed.payload.numel() / numel, 3)}
    bench.measure("encode", case, calls, 1, 2 * numel, {"encode": bits})
