"""Find out at which numbers of rows the fast product in order has the bits of other products here, and what it takes.

Compared are cuBLAS, which mode "fused-exact" would be compared with, and a plain kernel of Triton with one accumulator,
whose order is that of vLLM's kernel for VLLM_BATCH_INVARIANT. All products cancel, so that another order shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench.kernels import order
from bench.kernels.groups import captured
from bench.kernels.timing import Bench
from bench_setup import normal
from torch.nn import functional

from vllm_dfloat.device import fast_fused, fast_ops
from vllm_dfloat.integration.layers import cancelling

# Linear layers of Llama 3.1 8B.
MATRICES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28_672, 4096),
    "down": (4096, 14_336),
}
NUM_X = [1, 2, 4, 8, 16, 17, 32, 48, 64]
TIMED = [1, 16, 64]

Product = Callable[[torch.Tensor], torch.Tensor]


def run(bench: Bench) -> None:
    for name, (rows, cols) in bench.pick(MATRICES, {"tiny": (64, 128)}).items():
        if bench.begin("in_order", f"{name} {rows} x {cols}"):
            _compare(bench, name, rows, cols)
    for name, (rows, cols) in bench.pick(MATRICES, {"tiny": (64, 128)}).items():
        for num_x in bench.pick(TIMED, [1]):
            if bench.begin("in_order", f"{name} {rows} x {cols}, {num_x} rows"):
                _time(bench, name, rows, cols, num_x)


def _in_order(weight: torch.Tensor) -> Product:
    held = fast_ops.pack_again(weight, "w")
    nothing = torch.empty(0, dtype=torch.int32, device=weight.device)
    scratch = nothing.view(torch.bfloat16), nothing
    return lambda x: fast_fused.launch_in_order(x, held.desc, *weight.shape, None, scratch)


def _compare(bench: Bench, name: str, rows: int, cols: int) -> None:
    counts = bench.pick(NUM_X, [1, 3])
    x, weight, _ = cancelling.operands(max(counts), rows, cols, None, bench.device)
    ours = _in_order(weight)
    others: dict[str, Product] = {
        "cuBLAS" if bench.is_gpu else "the CPU's GEMM": lambda x: functional.linear(x, weight),
        "plain Triton": lambda x: order.in_order(weight, x),
    }
    for other, product in others.items():
        unequal = [num_x for num_x in counts if order.unequal(ours(x[:num_x]), product(x[:num_x]))]
        reason = f"other bits at {unequal} rows" if unequal else "equal bits at all numbers of rows"
        bench.tell("in_order", f"{name} {rows} x {cols}", f"in order, beside {other}", reason)


def _time(bench: Bench, name: str, rows: int, cols: int, num_x: int) -> None:
    weight, x = normal(rows, cols, bench.device), normal(num_x, cols, bench.device, seed=1)
    weights = [weight, *(weight.clone() for _ in range(bench.num_sets(rows * cols) - 1))]
    ours = [_in_order(weight) for weight in weights]
    works = {
        "BF16": [lambda weight=weight: functional.linear(x, weight) for weight in weights],
        "in order": [lambda product=product: product(x) for product in ours],
    }
    calls = {}
    for key, each in works.items():
        ready = [captured(work).replay if bench.is_gpu else work for work in each]
        calls[key] = lambda i, ready=ready: ready[i]()
    bench.measure(
        "in_order", f"{name} {rows} x {cols}, {num_x} rows", calls, len(weights), 2 * rows * cols
    )
