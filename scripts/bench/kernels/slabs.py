"""Measure decoding and multiplying a matrix slab by slab, a run of its rows at a time, against the whole at once.

A slab that fits the L2 cache might be multiplied from there, and needs less scratch. The GEMM over fewer rows may add
in another order: each LM head is told with the numbers of activation rows at which the bits are other ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench.kernels.groups import captured, ignoring
from bench.kernels.runs import LAYOUTS, InRuns
from bench.kernels.timing import Bench
from bench_setup import normal
from torch.nn import functional

from vllm_dfloat.codec.slabs import slab_rows, spans
from vllm_dfloat.integration.layers.head_proof import SlabProduct, equal_counts
from vllm_dfloat.integration.layers.linear_op import PLAIN

# Rows and columns of Llama 3.1 8B and 70B (two GPUs) and of Gemma 3 27B.
TIMED = {"8B head": (128_256, 4096), "8B gate_up": (28_672, 4096)}
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
    for name, (rows, cols) in bench.pick(TIMED, {"tiny": (256, 64)}).items():
        for num_x in bench.pick([1, 64], [1]):
            if bench.begin("slabs", f"{name} {rows} x {cols}, {num_x} rows"):
                _time(bench, name, rows, cols, num_x)


def _time(bench: Bench, name: str, rows: int, cols: int, num_x: int) -> None:
    weight, x = normal(rows, cols, bench.device), normal(num_x, cols, bench.device, seed=1)
    works: dict[str, Callable[[], object]] = {"BF16": lambda: functional.linear(x, weight)}
    for layout, ending in LAYOUTS.items():
        held = InRuns(layout, weight)
        works[f"whole{ending}"] = lambda held=held: functional.linear(x, held.whole())
        for mib in bench.pick(MIB, MIB[:1]):
            step = slab_rows(rows, cols, bench.pick(mib << 20, 1 << 14))
            works[f"{-(-rows // step)} slabs of {mib} MiB{ending}"] = by_slab(held, x, step)
    calls = {
        key: ignoring(captured(work).replay if bench.is_gpu else work)
        for key, work in works.items()
    }
    bench.measure("slabs", f"{name} {rows} x {cols}, {num_x} rows", calls)


def by_slab(held: InRuns, x: torch.Tensor, step: int) -> Callable[[], object]:
    """Return a call that multiplies slabs of `step` rows, each decoded before, into their columns of the result."""
    out = torch.empty(len(x), held.rows, dtype=x.dtype, device=x.device)

    def work() -> None:
        for first, end in spans(held.rows, step):
            out[:, first:end] = functional.linear(x, held.run(first, end))

    return work


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
