"""Measure the product with the fast layout against cuBLAS on BF16 weights, for several ways to launch its kernels.

Beside the kernels stands what they compete with: cuBLAS on BF16 weights, and decoding followed by it. The rows of
activations that matter most come first, for all matrices of an 8B model; then those of a 32B one. Each kernel first
multiplies a small hard matrix, with escapes, a raw tile and a row of zeros, and the product is compared with one in
FP64. Before anything is timed, the three forms of one kernel of each kind, Triton alone and those with PTX, are
compared bit for bit. Kernels compile in processes of their own, because that takes most of the time. Of the weights of
large matrices 0.03 % are escapes, as in trained ones.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from bench.kernels.fast_decode import buffers, pack
from bench.kernels.fused import LLAMA_8B, QWEN3_32B
from bench.kernels.timing import Bench, Call, WrongBitsError, expect_same_bits
from torch.nn import functional

from vllm_dfloat.device import fast_ops
from vllm_dfloat.device.fast_ops import FastWeight
from vllm_dfloat.device.packed_weight import make_descriptor
from vllm_dfloat.kernels import fast_matmul as kernels
from vllm_dfloat.kernels.fast_escapes import PATCHED, PERMUTED, PLAIN
from vllm_dfloat.kernels.fast_product import (
    LOW_BANDS,
    TALL_BANDS,
    Choice,
    DotShape,
    FastProduct,
    GemvShape,
)

NAMES = {PLAIN: "plain", PATCHED: "patched", PERMUTED: "prmt"}
WARPS_2 = DotShape(rows=32, warps=2, width=4)
WARPS_1 = DotShape(rows=32, warps=1, width=4)
AHEAD = DotShape(rows=16, stages=1, warps=1, width=4)
IN_ORDER = DotShape(rows=16, cols=256, stages=1, warps=2, width=4, in_order=True)
IN_ORDER_8 = replace(IN_ORDER, rows=8)
_AHEAD = (AHEAD, IN_ORDER, IN_ORDER_8)
# Rows of activations, the most important first, and what is compared for them: what a table might choose.
TRIED: dict[int, tuple[DotShape | GemvShape, ...]] = {
    8: (*_AHEAD, LOW_BANDS, WARPS_2),
    16: (*_AHEAD, LOW_BANDS, WARPS_1),
    1: (*_AHEAD, GemvShape()),
    64: (TALL_BANDS, DotShape()),
    4: (*_AHEAD, GemvShape()),
    32: (AHEAD, IN_ORDER_8, TALL_BANDS, DotShape()),
    2: (*_AHEAD, GemvShape()),
    128: (TALL_BANDS,),
    256: (TALL_BANDS,),
}
MOST_TRIED = 6  # of the shapes above with different numbers of parts, per case
WARPS = (768, 1536)  # columns are cut until so many warps run
# What is compared in all forms, and for how many rows of activations: a kernel of each kind, as some case launches it.
ALL_FORMS = (
    (AHEAD, 8), (IN_ORDER, 8), (LOW_BANDS, 16), (GemvShape(), 1), (TALL_BANDS, 64), (DotShape(), 32)
)  # fmt: skip
PATIENCE = 10  # seconds for a kernel that is being compiled
FORMS_PATIENCE = 25  # seconds for those of ALL_FORMS; at most a third of the time that is left
ESCAPES = 3e-4
HARD_ROWS, HARD_COLS = 208, 1024


class Kernel(NamedTuple):
    """One compiled kernel: its shape with 1 part or 2, its form, and the rows of x that it is compiled for."""

    shape: DotShape | GemvShape
    form: int
    num_x: int


def run(bench: Bench) -> None:
    if not bench.is_gpu:
        return _rehearse(bench)
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn"))
    try:
        _run(bench, {kernel: pool.submit(compile_kernel, kernel) for kernel in _kernels()})
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _rehearse(bench: Bench) -> None:
    for num_x, shape in (
        (1, GemvShape()), (5, DotShape(parts=2)), (5, AHEAD), (5, LOW_BANDS), (66, TALL_BANDS)
    ):  # fmt: skip
        if not bench.begin("fast_fused", f"tiny 64 x 256, {num_x} rows"):
            continue
        matrix, weight = _matrix(64, 256, bench.device)
        _measure(bench, "tiny", [weight], [matrix], num_x, [Kernel(shape, PLAIN, num_x)])


def _run(bench: Bench, compiled: dict[Kernel, Future[None]]) -> None:
    checked: dict[Kernel, bool] = {}
    late = _compare_forms(bench, compiled, checked)
    matrices: dict[str, tuple[list[torch.Tensor], list[FastWeight]]] = {}
    for shapes in (LLAMA_8B, QWEN3_32B):
        for num_x, (name, (rows, cols)) in product(TRIED, shapes.items()):
            if not bench.begin("fast_fused", f"{name} {rows} x {cols}, {num_x} rows"):
                continue
            if name not in matrices:
                matrices[name] = _sets(bench, rows, cols)
            kept = [
                k for k in tried(rows, cols, num_x) if _check(bench, _key(k), compiled, checked)
            ]
            _measure(bench, name, *matrices[name], num_x, kept)
    for kernel in late:
        _compare_form(bench, kernel, compiled, checked)


def _forms() -> list[Kernel]:
    """Return the kernels that have the bits of PERMUTED in another form."""
    return [
        _key(Kernel(shape, form, num_x)) for shape, num_x in ALL_FORMS for form in (PATCHED, PLAIN)
    ]


def _compare_forms(
    bench: Bench, compiled: dict[Kernel, Future[None]], checked: dict[Kernel, bool]
) -> list[Kernel]:
    """Compare the forms that are compiled in time; return the others, so that slow ones do not delay all cases."""
    now, late = time.monotonic(), []
    until = now + min(FORMS_PATIENCE, (bench.deadline - now) / 3)
    for kernel in _forms():
        needed = {compiled[kernel], compiled[kernel._replace(form=PERMUTED)]}
        if wait(needed, max(0, until - time.monotonic())).not_done:
            late.append(kernel)
        else:
            _compare_form(bench, kernel, compiled, checked)
    return late


def _compare_form(
    bench: Bench,
    kernel: Kernel,
    compiled: dict[Kernel, Future[None]],
    checked: dict[Kernel, bool],
) -> None:
    """Compare a kernel, if it could be compiled, with its twin in form PERMUTED."""
    twin = kernel._replace(form=PERMUTED)
    if not bench.begin("fast_fused", f"{_name(kernel)}, {kernel.num_x} rows"):
        return
    if not all(_check(bench, each, compiled, checked) for each in (twin, kernel)):
        return
    weight = hard(bench.device)
    x = torch.randn(kernel.num_x, HARD_COLS, device=bench.device).bfloat16()
    matrix = pack(weight)
    found, expected = (_product(x, matrix, each) for each in (kernel, twin))
    before = len(bench.wrong)
    bench.compare(expect_same_bits, found, expected, f"{_name(kernel)} against prmt")
    told = "other bits" if len(bench.wrong) > before else "equal bits"
    bench.tell("fast_fused", f"{kernel.num_x} rows", _name(kernel), f"{told} beside prmt")


def _sets(bench: Bench, rows: int, cols: int) -> tuple[list[torch.Tensor], list[FastWeight]]:
    """Return several copies of a matrix in BF16 and in the fast layout."""
    matrix, weight = _matrix(rows, cols, bench.device)
    more = range(bench.num_sets(matrix.num_bytes) - 1)
    return [weight, *(weight.clone() for _ in more)], [matrix, *(_copy(matrix) for _ in more)]


def tried(rows: int, cols: int, num_x: int) -> list[Kernel]:
    """Return what is compared for a matrix and a number of rows of activations, each with fewer and with more parts."""
    found = []
    for warps in WARPS:
        for shape in TRIED[num_x]:
            table = FastProduct((Choice(num_x, shape, warps // shape.warps),))
            found.append(Kernel(table.launch_shape(rows, cols, num_x), PERMUTED, num_x))
    return list(dict.fromkeys(found))[:MOST_TRIED]


def _key(kernel: Kernel) -> Kernel:
    """Return the kernel that is compiled for `kernel`: the number of parts matters only if it is more than 1."""
    parts = min(2, kernel.shape.parts)
    compiled = kernels.compiled_rows(kernel.num_x, kernel.shape)
    return Kernel(replace(kernel.shape, parts=parts), kernel.form, compiled)


def _kernels() -> list[Kernel]:
    """Return what must be compiled, in the order in which it is needed."""
    sizes = [*LLAMA_8B.values(), *QWEN3_32B.values()]
    cases = [tried(*size, num_x) for num_x, size in product(TRIED, sizes)]
    forms = [each for kernel in _forms() for each in (kernel._replace(form=PERMUTED), kernel)]
    return list(dict.fromkeys([*forms, *(_key(kernel) for case in cases for kernel in case)]))


def compile_kernel(kernel: Kernel) -> None:
    """Compile one kernel into Triton's cache on disk, by launching it."""
    device = torch.device("cuda")
    x = torch.zeros(kernel.num_x, 128, dtype=torch.bfloat16, device=device)
    _product(x, pack(torch.ones(64, 128, dtype=torch.bfloat16, device=device)), kernel)
    torch.cuda.synchronize()


def _product(x: torch.Tensor, matrix: FastWeight, kernel: Kernel) -> torch.Tensor:
    """Return the product, computed in memory of NaNs."""
    out = torch.full((len(x), matrix.rows), float("nan"), dtype=torch.bfloat16, device=x.device)
    size = kernels.num_partials(matrix.rows, len(x), kernel.shape)
    partials = torch.full((size,), float("nan"), device=x.device)
    kernels.matmul(x, matrix.desc, matrix.cols, None, out, partials, kernel.shape, kernel.form)
    return out


def _matrix(rows: int, cols: int, device: torch.device) -> tuple[FastWeight, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(7)
    weight = torch.randn(rows, cols, generator=generator, device=device).mul_(0.02).bfloat16()
    count = int(ESCAPES * weight.numel())
    at = torch.randint(weight.numel(), (count,), generator=generator, device=device)
    weight.view(-1)[at] = (weight.view(-1)[at].float() * 2.0**-24).bfloat16()
    return pack(weight), weight


def hard(device: torch.device) -> torch.Tensor:
    _, weight = _matrix(HARD_ROWS, HARD_COLS, device)
    weight[1] = 0
    weight[64, 0] = weight[65, 127] = weight[69, 255] = weight[-1, -1] = 1e-30
    weight[66, 130:140] = 1e30
    spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).to(device)
    weight[:64, 128:256] = (0.02 * torch.exp(8 * spread)).bfloat16()
    return weight


def _copy(matrix: FastWeight) -> FastWeight:
    payload = matrix.payload.clone()
    desc = make_descriptor(payload, matrix.fields, matrix.size, matrix.name)
    return replace(matrix, payload=payload, desc=desc)


def _check(
    bench: Bench,
    kernel: Kernel,
    compiled: dict[Kernel, Future[None]],
    checked: dict[Kernel, bool],
) -> bool:
    """Return whether the kernel could be compiled; compare its product, once, with FP64."""
    if kernel in checked:
        return checked[kernel]
    try:
        left = bench.deadline - time.monotonic()
        compiled[kernel].result(timeout=max(0.1, min(PATIENCE, left)))
    except Exception as error:
        bench.skip("fast_fused", "forms", _name(kernel), f"{type(error).__name__}: {error}"[-200:])
        checked[kernel] = False
        return False
    checked[kernel] = True
    weight = hard(bench.device)
    matrix = pack(weight)
    x = torch.randn(kernel.num_x, HARD_COLS, device=bench.device).bfloat16()
    bench.compare(check_product, x, matrix, weight, kernel)
    return True


def check_product(
    x: torch.Tensor, matrix: FastWeight, weight: torch.Tensor, kernel: Kernel
) -> None:
    """Raise WrongBitsError unless two products are equal and within the bound of kernels/fast_matmul.py."""
    out = _product(x, matrix, kernel)
    exact = x.double() @ weight.double().T
    lost = (matrix.cols + 1) * 2**-23 * (x.double().abs() @ weight.double().abs().T)
    bound = (lost + 2**-8 * (exact.abs() + lost)).clamp_min(1e-300)
    excess = ((out.double() - exact).abs() / bound).nan_to_num(nan=float("inf")).max().item()
    if not excess <= 1:
        raise WrongBitsError(f"{_name(kernel)}: an error of {excess:.3g} times its bound")
    expect_same_bits(_product(x, matrix, kernel), out, f"{_name(kernel)}, a second time")


def _name(kernel: Kernel) -> str:
    return name_of(kernel.shape, kernel.form)


def name_of(shape: DotShape | GemvShape, form: int = PERMUTED) -> str:
    """Return the name of a launch in rows."""
    kind = "dot" if isinstance(shape, DotShape) else "gemv"
    sizes = "x".join(str(value) for name, value in vars(shape).items() if name != "parts")
    return f"{kind} {sizes} parts {shape.parts} {NAMES[form]}"


def _measure(
    bench: Bench,
    name: str,
    weights: list[torch.Tensor],
    held: list[FastWeight],
    num_x: int,
    tried: list[Kernel],
) -> None:
    rows, cols = weights[0].shape
    x = torch.randn(num_x, cols, device=bench.device).bfloat16()
    out = torch.empty(num_x, rows, dtype=torch.bfloat16, device=bench.device)
    sizes = [kernels.num_partials(rows, num_x, kernel.shape) for kernel in tried]
    partials = torch.empty(max(sizes, default=0), device=bench.device)
    calls: dict[str, Call] = {"cuBLAS on BF16": lambda i: functional.linear(x, weights[i])}
    if bench.is_gpu:
        calls["decode, then cuBLAS"] = _decode_call(x, held, rows, cols)
    for kernel in tried:
        bench.compare(check_product, x, held[0], weights[0], kernel)
        calls[_name(kernel)] = _call(x, held, out, partials, kernel)
    case = f"{name} {rows} x {cols}, {num_x} rows"
    bench.measure("fast_fused", case, calls, len(held), 2 * rows * cols)


def _decode_call(x: torch.Tensor, held: list[FastWeight], rows: int, cols: int) -> Call:
    decoded, status = buffers(held[0])

    def call(i: int) -> Any:
        fast_ops.launch_decode(held[i].desc, rows, cols, decoded, status)
        return functional.linear(x, decoded[: rows * cols].view(rows, cols))

    return call


def _call(
    x: torch.Tensor,
    held: list[FastWeight],
    out: torch.Tensor,
    partials: torch.Tensor,
    kernel: Kernel,
) -> Call:
    def call(i: int) -> Any:
        weight = held[i]
        kernels.matmul(x, weight.desc, weight.cols, None, out, partials, kernel.shape, kernel.form)

    return call
