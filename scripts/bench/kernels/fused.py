"""Measure the fused matrix product against cuBLAS on BF16 weights, and against decoding and then cuBLAS.

Each call uses the next set of weights, but the same scratch buffer, as in serving, where all layers share it.
"""

from __future__ import annotations

import torch
from bench.kernels.decode import check_decode
from bench.kernels.timing import Bench, Call, WrongBitsError, expect_no_status, expect_same_bits
from bench_setup import copy_of, nan_memory, normal
from torch.nn import functional

from vllm_dfloat.codec import layout
from vllm_dfloat.device import fused, ops

# Linear layers of Llama 3.1 8B as vLLM fuses them: rows, columns. The most important come first: time may run out.
LLAMA_8B = {
    "gate_up": (28_672, 4096),
    "o": (4096, 4096),
    "down": (4096, 14_336),
    "qkv": (6144, 4096),
}
# Of Qwen3 32B, those that take longest.
QWEN3_32B = {"32B gate_up": (51_200, 5120), "32B down": (5120, 25_600)}
NUM_X = [1, 4, 2]


def run(bench: Bench) -> None:
    tiny = {"tiny": (2, layout.TILE_WEIGHTS)}
    for name, (rows, cols) in bench.pick(LLAMA_8B, tiny).items():
        if not bench.begin("fused", f"{name} {rows} x {cols}"):
            continue
        weight = normal(rows, cols, bench.device)
        packed = ops.pack(weight, name)
        bench.compare(check_decode, packed, weight, f"decode {name}", ops.decode)
        num_sets = bench.num_sets(packed.num_bytes)
        weights = [weight] + [weight.clone() for _ in range(num_sets - 1)]
        held = [packed] + [copy_of(packed) for _ in range(num_sets - 1)]
        for num_x in bench.pick(NUM_X, [1]):
            case = f"{name} {rows} x {cols}, {num_x} rows"
            if bench.begin("fused", case):
                _measure(bench, case, weights, held, num_x)


def _measure(
    bench: Bench,
    case: str,
    weights: list[torch.Tensor],
    held: list[ops.PackedWeight],
    num_x: int,
) -> None:
    rows, cols = weights[0].shape
    x = normal(num_x, cols, bench.device, seed=num_x) * 50
    for packed in held:
        bench.compare(check_fused, packed, weights[0], x, f"fused {case}")
    memory, status = scratch_for(rows, cols, bench.device)
    decoded = memory[: rows * cols].view(rows, cols)

    def decode_then_gemm(i: int) -> torch.Tensor:
        ops.decode(held[i].desc, rows, cols, memory, status)
        return functional.linear(x, decoded)

    scratch = memory, status
    calls: dict[str, Call] = {
        "cuBLAS on BF16": lambda i: functional.linear(x, weights[i]),
        "fused": lambda i: fused.matmul(x, held[i].desc, rows, cols, None, scratch),
        "decode, then cuBLAS": decode_then_gemm,
    }
    bench.measure("fused", case, calls, len(held), 2 * rows * cols)


def scratch_for(rows: int, cols: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    memory = torch.empty(ops.padded_numel(rows, cols), dtype=torch.bfloat16, device=device)
    return memory, torch.empty(ops.num_tiles(rows, cols), dtype=torch.int32, device=device)


def check_fused(packed: ops.PackedWeight, weight: torch.Tensor, x: torch.Tensor, what: str) -> None:
    """Raise WrongBitsError unless two products are equal and within the bound of kernels/packed_matmul.py."""
    rows, cols = weight.shape
    memory, status = scratch_for(rows, cols, x.device)
    memory.view(torch.int16).fill_(-1)  # a NaN
    status.fill_(-1)
    with nan_memory():
        out = fused.matmul(x, packed.desc, rows, cols, None, (memory, status))
    expect_no_status(status, what)
    exact = x.double() @ weight.double().T
    lost = (cols + 1) * 2**-23 * (x.double().abs() @ weight.double().abs().T)
    excess = ((out.double() - exact).abs() / (lost + 2**-8 * (exact.abs() + lost))).max().item()
    if not excess <= 1:
        raise WrongBitsError(f"{what}: an error of {excess:.3g} times its bound")
    memory.view(torch.int16).fill_(-1)
    again = fused.matmul(x, packed.desc, rows, cols, None, (memory, status))
    expect_same_bits(again, out, f"{what}, a second time")
