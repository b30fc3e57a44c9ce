"""The case on which each launch parameter is tried: a kernel, its inputs, and the expected bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench.kernels.decode import TABLE, buffers, check_decode
from bench.kernels.fused import LLAMA_8B, check_fused, scratch_for
from bench.kernels.groups import Group, captured, ignoring
from bench.kernels.held_experts import LAYERS, TINY, Held, choices, weights_of
from bench.kernels.runs import InRuns
from bench.kernels.timing import Bench, Call
from bench_setup import copy_of, normal
from torch.nn import functional
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from vllm_dfloat.codec import layout
from vllm_dfloat.codec.slabs import slab_rows
from vllm_dfloat.device import fused, ops, unit_resident
from vllm_dfloat.kernels.packed_matmul import MAX_ROWS

NUM_X = {"fused_gemv_tiles_per_program": 1}


@dataclass(frozen=True)
class Case:
    """One kernel on inputs of a real layer's size.

    Attributes:
        name: for the table.
        call: launches the kernel on one of `num_sets` sets of inputs.
        check: launches the kernel and raises WrongBitsError if the result is wrong.
        cannot_launch: exceptions of Triton for parameters that the device or the kernel does not take.
    """

    name: str
    call: Call
    check: Callable[[], None]
    num_sets: int
    cannot_launch: tuple[type[Exception], ...] = (OutOfResources, CompilationError, PTXASError)


def cases_for(bench: Bench, field: str) -> list[Case]:
    """Return what the parameter is used for."""
    if field in NUM_X:
        return [_fused(bench, NUM_X[field])]
    if field == "chosen_programs":
        return [_experts(bench, "packed"), _experts(bench, "fast")]
    if field.startswith("fast_"):
        return [_fast_decode(bench), _fast_runs(bench), _experts(bench, "fast", only_single=True)]
    return [_decode(bench, is_official=field == "dfloat11_num_warps")]


def _decode(bench: Bench, is_official: bool) -> Case:
    rows, cols = bench.pick((14_336, 4096), (8, 300))
    weight = normal(rows, cols, bench.device)
    pack, decode = (
        (unit_resident.pack, unit_resident.decode) if is_official else (ops.pack, ops.decode)
    )
    packed = pack(weight, "w")
    num_sets = bench.num_sets(packed.num_bytes + 2 * weight.numel())
    held = [packed] + [copy_of(packed) for _ in range(num_sets - 1)]
    outs = [buffers(one) for one in held]
    return Case(
        f"decode {rows} x {cols}",
        lambda i: decode(held[i].desc, rows, cols, *outs[i]),
        lambda: check_decode(packed, weight, f"decode {rows} x {cols}", decode),
        num_sets,
    )


def _fast_decode(bench: Bench) -> Case:
    rows, cols = bench.pick((14_336, 4096), (8, 300))
    weight = normal(rows, cols, bench.device)
    num_sets = bench.num_sets(weight.numel() * 7 // 2)
    held = [InRuns("fast", weight) for _ in range(num_sets)]
    name = f"fast decode {rows} x {cols}"
    return Case(
        name, lambda i: held[i].whole(), lambda: held[0].check(weight, rows, name), num_sets
    )


def _fast_runs(bench: Bench) -> Case:
    """Decode an LM head as slabs of 64 MiB are."""
    rows, cols = bench.pick(TABLE, (256, 128))
    weight = normal(rows, cols, bench.device)
    held, step = InRuns("fast", weight), slab_rows(rows, cols, bench.pick(64 << 20, 1 << 15))
    name = f"{-(-rows // step)} runs of {step} x {cols}, fast layout"
    return Case(name, lambda i: held.runs(step), lambda: held.check(weight, step, name), 1)


def _experts(bench: Bench, layout: str, only_single: bool = False) -> Case:
    """Decode the experts of single tokens, then nearly all unless `only_single`: each has about half of the time."""
    name, shape = next(iter(bench.pick(LAYERS, TINY).items()))
    held = Held(layout, weights_of(shape, bench.device))
    single = choices(bench, shape, 1, bench.pick(16, 1))
    many = [] if only_single else choices(bench, shape, bench.pick(64, 2), 1)
    case = f"chosen experts, {layout}, {name}"

    def call(i: int) -> None:
        for ids in (*single, *many):
            held.decode_chosen(ids)

    def check() -> None:
        for ids in (single[0], *many):
            held.check_chosen(ids, case)

    return Case(case, call, check, 1)


def _fused(bench: Bench, num_x: int) -> Case:
    rows, cols = bench.pick(LLAMA_8B["gate_up"], (3, layout.TILE_WEIGHTS))
    weight = normal(rows, cols, bench.device)
    packed = ops.pack(weight, "w")
    num_sets = bench.num_sets(packed.num_bytes)
    held = [packed] + [copy_of(packed) for _ in range(num_sets - 1)]
    x, scratch = normal(num_x, cols, bench.device, seed=1), scratch_for(rows, cols, bench.device)
    name = f"fused {rows} x {cols}, {num_x} rows"
    return Case(
        name,
        lambda i: fused.matmul(x, held[i].desc, rows, cols, None, scratch),
        lambda: check_fused(packed, weight, x, name),
        num_sets,
    )


def fused_max_rows(bench: Bench) -> dict[str, int]:
    """Return for how many rows of activations the fused product beats decode and GEMM: fields of a LaunchConfig."""
    counts = fused.compiled_for(bench.pick(MAX_ROWS, 1))
    shapes = bench.pick(list(LLAMA_8B.values()), [(3, layout.TILE_WEIGHTS)])
    return rows_by_shape({shape: _rows_won(bench, *shape, counts) for shape in shapes})


def rows_by_shape(won: dict[tuple[int, int], int]) -> dict[str, int]:
    """Return what suits all shapes of matrices, given up to how many rows of activations the fused product wins.

    All matrices get what the worst one wins; those with as many rows as a matrix from which on all win as much as the
    largest one does get that.
    """
    sizes = sorted({rows for rows, _ in won})
    least = {rows: min(most for (of, _), most in won.items() if of >= rows) for rows in sizes}
    if_large = least[sizes[-1]]
    return {
        "fused_max_rows": least[sizes[0]],
        "fused_max_rows_if_large": if_large,
        "fused_large_rows": min(rows for rows in sizes if least[rows] == if_large),
    }


def _rows_won(bench: Bench, rows: int, cols: int, counts: list[int]) -> int:
    """Return the largest number of rows of activations up to which the fused product is faster; 0 if never."""
    largest = 0
    for num_x in counts:
        first = len(bench.rows)
        _compare(bench, rows, cols, num_x)
        us = {row["name"]: row["us"] for row in bench.rows[first:]}
        if us["fused"] >= us["decode, then GEMM"]:
            break
        largest = num_x
    return largest


def _compare(bench: Bench, rows: int, cols: int, num_x: int) -> None:
    weight = normal(rows, cols, bench.device)
    packed = ops.pack(weight, "w")
    num_sets = bench.num_sets(packed.num_bytes)
    held = [packed] + [copy_of(packed) for _ in range(num_sets - 1)]
    x, scratch = normal(num_x, cols, bench.device, seed=1), scratch_for(rows, cols, bench.device)
    check_fused(packed, weight, x, f"fused {rows} x {cols}, {num_x} rows")
    decoded = scratch[0][: rows * cols].view(rows, cols)

    def decode_then_gemm(i: int) -> torch.Tensor:
        ops.decode(held[i].desc, rows, cols, *scratch)
        return functional.linear(x, decoded)

    calls: dict[str, Call] = {
        "decode, then GEMM": decode_then_gemm,
        "fused": lambda i: fused.matmul(x, held[i].desc, rows, cols, None, scratch),
    }
    bench.measure("fused_max_rows", f"{rows} x {cols}, {num_x} rows", calls, num_sets)


def group_max_numel(bench: Bench) -> int:
    """Return the largest group, in weights, for which one launch beats one per matrix; 0 if never.

    It is measured in CUDA graphs, as in serving, with sizes of models with 0.5 to 8 billion weights.
    """
    largest = 0
    for hidden, inner in bench.pick([(896, 4864), (2048, 8192), (4096, 14_336)], [(64, 100)]):
        shapes = [(hidden * 3 // 2, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
        first = len(bench.rows)
        _compare_group(bench, shapes)
        if bench.rows[first + 1]["ratio"] >= 1:
            break
        largest = sum(rows * cols for rows, cols in shapes)
    return largest


def _compare_group(bench: Bench, shapes: list[tuple[int, int]]) -> None:
    group = Group([normal(*shape, bench.device, seed=i) for i, shape in enumerate(shapes)])
    works = {"a launch per matrix": group.one_by_one, "one launch": group.at_once}
    runs = {name: captured(work).replay if bench.is_gpu else work for name, work in works.items()}
    for name, run in runs.items():
        group.check(f"group, {name}", run)
    calls: dict[str, Call] = {name: ignoring(run) for name, run in runs.items()}
    numel = sum(rows * cols for rows, cols in shapes)
    bench.measure("group_decode_max_numel", f"{numel} weights", calls)
