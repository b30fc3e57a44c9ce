"""Measure decoding and multiplying a matrix slab by slab, a run of its rows at a time, against the whole at once.

A slab that fits the L2 cache might be multiplied from there, and needs less scratch. The GEMM over fewer rows may add
in another order: each LM head is told with the numbers of activation rows at which the bits are other ones.
"""

from __future__ import annotations

import torch
from bench.kernels.decode import buffers
from bench.kernels.groups import captured, ignoring
from bench.kernels.timing import Bench
from bench_setup import normal
from torch.nn import functional

from vllm_dfloat.codec.slabs import slab_rows
from vllm_dfloat.device import ops
from vllm_dfloat.integration.layers.head_proof import SlabProduct, equal_counts
from vllm_dfloat.integration.layers.linear_op import PLAIN

# Rows and columns of Llama 3.1 8B and 70B (two GPUs) and of Gemma 3 27B.
TIMED = {"8B gate_up": (28_672, 4096), "8B down": (4096, 14_336)}
HEADS = {"8B head": (128_256, 4096), "27B head": (262_208, 5376), "70B head": (64_128, 8192)}
LARGEST = {
    "8B head": 28_672 * 4096,
    "27B head": 43_008 * 5376,
    "70B head": 28_672 * 8192,
}  # gate_up
NUM_X = [1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024]
MIB = [16, 32, 64]


def run(bench: Bench) -> None:
    for name, (rows, cols) in bench.pick(HEADS, {"tiny": (256, 64)}).items():
        if bench.begin("slabs", f"{name} {rows} x {cols}"):
            _prove(bench, name, rows, cols)
    for name, (rows, cols) in bench.pick(TIMED, {"tiny": (64, 64)}).items():
        for num_x in bench.pick([1, 64], [1]):
            if bench.begin("slabs", f"{name} {rows} x {cols}, {num_x} rows"):
                _time(bench, name, rows, cols, num_x)


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


def _prove(bench: Bench, name: str, rows: int, cols: int) -> None:
    """Report for each size of a slab the numbers of activation rows with other bits, as vLLM's start finds them.

    The last size is what the option `slab` takes by itself: the largest linear layer.
    """
    sizes = [mib << 20 for mib in (64, 128)] + [2 * LARGEST.get(name, 0)]
    for size in bench.pick(sizes, [1 << 14]):
        slab = slab_rows(rows, cols, size)
        counts = bench.pick(NUM_X, [1, 5])
        product = SlabProduct(bench.device, rows, cols, slab, PLAIN)
        unequal = sorted(set(counts) - equal_counts(product, counts))
        reason = f"other bits at {unequal} rows" if unequal else "equal bits at all numbers of rows"
        number = -(-rows // slab)
        bench.tell("slabs", f"{name} {rows} x {cols}", f"{number} slabs of {slab} rows", reason)
