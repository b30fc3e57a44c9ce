"""Measure decoding a matrix in runs of its rows, as LM heads in slabs are, against the whole at once and a copy."""

from __future__ import annotations

from typing import Any

import torch
from bench.kernels.decode import TABLE, copy_call
from bench.kernels.timing import FLOOR, Bench, Call, expect_no_status, expect_same_bits
from bench_setup import normal, poisoned

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.codec.slabs import slab_rows, spans
from vllm_dfloat.integration.layers.layouts import BY_NAME

SIZES = [TABLE, (28_672, 4096)]
MIB = [64, 128]
LAYOUTS = {"packed": "", "fast": ", fast layout"}  # and how the names of contenders end


class InRuns:
    """A matrix in a layout, and the memory that it is decoded into, whole or a run of its rows.

    Attributes:
        packed: the matrix.
        out: BF16, flat: where each run, or the whole, is decoded to.
        status: int32.
    """

    def __init__(self, layout: str, weight: torch.Tensor) -> None:
        self._functions = BY_NAME[layout]
        self.rows, self.cols = weight.shape
        self.packed = self._functions.pack(weight, "w")
        numel = self._functions.scratch_numel(self.rows, self.cols)
        self.out = poisoned(numel, weight.device)
        self.status = torch.empty(numel // TILE_WEIGHTS, dtype=torch.int32, device=weight.device)

    def whole(self) -> torch.Tensor:
        """Decode the whole matrix and return it, BF16 [rows, cols]."""
        self._functions.decode(self.packed.desc, self.rows, self.cols, self.out, self.status)
        return self._decoded(self.rows)

    def run(self, first: int, end: int) -> torch.Tensor:
        """Decode rows `first` to `end` - 1, where `first` begins a tile, and return them, BF16 [end - first, cols]."""
        sizes = self.rows, self.cols, first, end - first
        self._functions.decode_run(self.packed.desc, *sizes, self.out, self.status)
        return self._decoded(end - first)

    def runs(self, step: int) -> None:
        """Decode all runs of `step` rows, each over the one before."""
        for first, end in spans(self.rows, step):
            self.run(first, end)

    def check(self, weight: torch.Tensor, step: int, what: str) -> None:
        """Raise WrongBitsError unless every run, decoded into memory of NaN, is that of `weight`."""
        for first, end in spans(self.rows, step):
            self.out.view(torch.int16).fill_(-1)  # a NaN
            self.status.fill_(0)
            found = self.run(first, end)
            expect_no_status(self.status, what)
            expect_same_bits(found, weight[first:end], f"{what}, row {first}")

    def _decoded(self, count: int) -> torch.Tensor:
        return self.out[: count * self.cols].view(count, self.cols)


def run(bench: Bench) -> None:
    for rows, cols in bench.pick(SIZES, [(256, 208)]):
        if bench.begin("runs", f"{rows} x {cols}"):
            _measure(bench, rows, cols)


def _measure(bench: Bench, rows: int, cols: int) -> None:
    weight, numel = normal(rows, cols, bench.device), rows * cols
    held = {ending: InRuns(layout, weight) for layout, ending in LAYOUTS.items()}
    smallest = min(one.packed.num_bytes for one in held.values())
    calls: dict[str, Call] = {FLOOR: copy_call(bench, (2 * numel + smallest) // 2, 1)}
    facts: dict[str, dict[str, Any]] = {}
    for ending, one in held.items():
        calls[f"whole{ending}"] = lambda _, one=one: one.whole()
        facts[f"whole{ending}"] = {"bits_per_weight": round(8 * one.packed.num_bytes / numel, 3)}
        for mib in bench.pick(MIB, MIB[:1]):
            step = slab_rows(rows, cols, bench.pick(mib << 20, 1 << 14))
            name = f"{-(-rows // step)} runs of {step} rows{ending}"
            bench.compare(one.check, weight, step, f"{rows} x {cols}, {name}")
            calls[name] = lambda _, one=one, step=step: one.runs(step)
    bench.measure("runs", f"{rows} x {cols}", calls, 1, 2 * numel, facts)
