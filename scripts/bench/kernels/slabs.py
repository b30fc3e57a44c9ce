"""Measure decoding and multiplying a matrix slab by slab, a run of its rows at a time, against the whole at once.

A slab that fits the L2 cache might be multiplied from there, and needs less scratch. The GEMM over fewer rows may add
in another order: each shape is told with the numbers of activation rows at which the bits are other ones.
"""

from __future__ import annotations

import torch
from bench.kernels.decode import buffers
from bench.kernels.groups import captured, ignoring
from bench.kernels.timing import Bench
from bench_setup import normal
from torch.nn import functional

from vllm_dfloat.device import ops

# Rows and columns of Llama 3.1 8B and 70B (two GPUs) and of Gemma 3 27B; those that are timed come first.
TIMED = {"8B gate_up": (28_672, 4096), "8B down": (4096, 14_336)}
SHAPES = {
    **TIMED, "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B head": (128_256, 4096),
    "27B gate_up": (43_008, 5376), "27B down": (5376, 21_504), "27B head": (262_208, 5376),
    "70B gate_up": (28_672, 8192), "70B down": (8192, 14_336), "70B head": (64_128, 8192),
}  # fmt: skip
NUM_X = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
MIB = [16, 32, 64]
TINY = {"tiny": (64, 64)}


def run(bench: Bench) -> None:
    for name, (rows, cols) in bench.pick(TIMED, TINY).items():
        for num_x in bench.pick([1, 64], [1]):
            if bench.begin("slabs", f"{name} {rows} x {cols}, {num_x} rows"):
                _time(bench, name, rows, cols, num_x)
    for name, (rows, cols) in bench.pick(SHAPES, TINY).items():
        if bench.begin("slabs", f"{name} {rows} x {cols}"):
            _compare(bench, name, rows, cols)


def _slab_rows(bench: Bench, mib: int, cols: int) -> int:
    """Return the rows of a slab of `mib` MiB of BF16, a multiple of 64."""
    return bench.pick((mib << 20) // 2 // cols // 64 * 64, 32)


def _time(bench: Bench, name: str, rows: int, cols: int, num_x: int) -> None:
    weight, x = normal(rows, cols, bench.device), normal(num_x, cols, bench.device, seed=1)
    packed = ops.pack(weight, "w")
    scratch, status = buffers(packed)

    def whole() -> torch.Tensor:
        ops.decode(packed.desc, rows, cols, scratch, status)
        return functional.linear(x, scratch[: rows * cols].view(rows, cols))

    works = {"BF16": lambda: functional.linear(x, weight), "whole": whole}
    for mib in bench.pick(MIB, MIB[:1]):
        step = _slab_rows(bench, mib, cols)
        slabs = [(i, ops.pack(weight[i : i + step], "slab")) for i in range(0, rows, step)]
        out = torch.empty(num_x, rows, dtype=weight.dtype, device=bench.device)

        def by_slab(
            slabs: list[tuple[int, ops.PackedWeight]] = slabs, out: torch.Tensor = out
        ) -> None:
            for i, slab in slabs:
                ops.decode(slab.desc, slab.rows, cols, scratch, status)
                decoded = scratch[: slab.rows * cols].view(slab.rows, cols)
                out[:, i : i + slab.rows] = functional.linear(x, decoded)

        works[f"{len(slabs)} slabs of {mib} MiB"] = by_slab
    calls = {
        key: ignoring(captured(work).replay if bench.is_gpu else work)
        for key, work in works.items()
    }
    bench.measure("slabs", f"{name} {rows} x {cols}, {num_x} rows", calls)


def _compare(bench: Bench, name: str, rows: int, cols: int) -> None:
    """Report for each size of a slab the numbers of activation rows whose results have other bits."""
    weight = normal(rows, cols, bench.device, seed=3)
    for mib in bench.pick(MIB, MIB[:1]):
        step = _slab_rows(bench, mib, cols)
        unequal = []
        for num_x in bench.pick(NUM_X, [1]):
            x = normal(num_x, cols, bench.device, seed=num_x)
            expected = functional.linear(x, weight)
            parts = [functional.linear(x, weight[i : i + step]) for i in range(0, rows, step)]
            if not torch.equal(torch.cat(parts, 1).view(torch.int16), expected.view(torch.int16)):
                unequal.append(num_x)
        reason = f"other bits at {unequal} rows" if unequal else "equal bits at all numbers of rows"
        bench.tell("slabs", f"{name} {rows} x {cols}", f"slabs of {mib} MiB", reason)
