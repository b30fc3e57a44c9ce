"""Find out at which numbers of rows the fast product in order has the bits of other products here, and what it takes.

Compared are cuBLAS, which mode "fused-exact" would be compared with, and a plain kernel of Triton with one accumulator,
whose order is that of vLLM's kernel for VLLM_BATCH_INVARIANT. All products cancel, so that another order shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from bench.kernels import order
from bench.kernels.groups import captured
from bench.kernels.timing import Bench
from bench_setup import normal
from torch.nn import functional

from vllm_dfloat.device import fast_fused, fast_ops
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.kernels import fast_matmul
from vllm_dfloat.kernels.configs import HOPPER
from vllm_dfloat.kernels.fast_product import (
    LOW_BANDS,
    MAX_AHEAD_ROWS,
    MAX_LOW_ROWS,
    TALL_BANDS,
    DotShape,
)

# Linear layers of Llama 3.1 8B.
MATRICES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28_672, 4096),
    "down": (4096, 14_336),
}
NUM_X = [1, 2, 4, 8, 16, 17, 32, 48, 64]
TIMED = [1, 16, 64]  # of these as many as are multiplied so

# Rows of the matrix and warps of a program for up to MAX_AHEAD_ROWS of activations, beside what is chosen.
AHEAD = (16, 1), (16, 2), (8, 1), (8, 2)
MANY = (
    replace(TALL_BANDS, in_order=True),
    replace(TALL_BANDS, rows=64, warps=2, in_order=True),
    DotShape(in_order=True),
)

Product = Callable[[torch.Tensor], torch.Tensor]


def run(bench: Bench) -> None:
    for name, (rows, cols) in bench.pick(MATRICES, {"tiny": (64, 128)}).items():
        if bench.begin("in_order", f"{name} {rows} x {cols}"):
            _compare(bench, name, rows, cols)
    for name, (rows, cols) in bench.pick(MATRICES, {"tiny": (64, 128)}).items():
        for num_x in bench.pick(TIMED, [1]):
            if num_x <= HOPPER.max_rows_in_order(rows) and bench.begin(
                "in_order", f"{name} {rows} x {cols}, {num_x} rows"
            ):
                _time(bench, name, rows, cols, num_x)


def _in_order(held: fast_ops.FastWeight, shape: DotShape | None = None) -> Product:
    """Return the product as it is launched, or in another shape."""
    nothing = torch.empty(0, dtype=torch.int32, device=held.desc.device)
    rows, cols = held.rows, held.cols
    if shape is None:
        scratch = nothing.view(torch.bfloat16), nothing
        return lambda x: fast_fused.launch_in_order(x, held.desc, rows, cols, None, scratch)

    def product(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), rows)
        fast_matmul.matmul(x, held.desc, cols, None, out, nothing.view(torch.float32), shape)
        return out

    return product


def _others(rows: int, cols: int, num_x: int, is_gpu: bool) -> dict[str, DotShape]:
    """Return how else the product in order could be launched."""
    if num_x <= MAX_AHEAD_ROWS:
        shapes = [
            DotShape(of_a_program, 128 * warps, stages=1, warps=warps, width=4, in_order=True)
            for of_a_program, warps in AHEAD
        ]
        shapes.append(replace(LOW_BANDS if num_x <= MAX_LOW_ROWS else TALL_BANDS, in_order=True))
    else:
        shapes = list(MANY)
    chosen = HOPPER.in_order_shape(rows, cols, num_x, is_gpu)
    return {
        f"in order, {shape.rows} rows, {shape.warps} warps, {shape.stages} stages": shape
        for shape in shapes
        if shape != chosen and cols % shape.cols == 0
    }


def _compare(bench: Bench, name: str, rows: int, cols: int) -> None:
    most = HOPPER.max_rows_in_order(rows)
    counts = [num_x for num_x in bench.pick(NUM_X, [1, 3]) if num_x <= most]
    x, weight, _ = cancelling.operands(max(counts), rows, cols, None, bench.device)
    ours = _in_order(fast_ops.pack_again(weight, "w"))
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
    held = [fast_ops.pack_again(weight, "w") for weight in weights]
    products = {
        "BF16": [lambda x, weight=weight: functional.linear(x, weight) for weight in weights],
        "in order": [_in_order(each) for each in held],
    }
    case, (chosen, *_) = f"{name} {rows} x {cols}, {num_x} rows", products["in order"]
    for key, shape in _others(rows, cols, num_x, bench.is_gpu).items():
        products[key] = [_in_order(each, shape) for each in held]
        if order.unequal(products[key][0](x), chosen(x)):
            bench.tell("in_order", case, key, "other bits")
    works = {
        key: [lambda product=product: product(x) for product in each]
        for key, each in products.items()
    }
    calls = {}
    for key, each in works.items():
        ready = [captured(work).replay if bench.is_gpu else work for work in each]
        calls[key] = lambda i, ready=ready: ready[i]()
    bench.measure("in_order", case, calls, len(weights), 2 * rows * cols)
