"""Measure groups, the matrices of a transformer block: one launch or one per matrix, with and without a CUDA graph.

Measure decoding ahead ("overlap") too: while a GEMM runs, the next matrix is decoded on a second stream into a second
buffer. It is compared with the serial form and with GEMMs on BF16 weights, each replayed from a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.kernels.fused import LLAMA_8B, scratch_for
from bench.kernels.timing import Bench, Call, expect_no_status, expect_same_bits
from bench_setup import normal, poisoned
from torch.nn import functional

from vllm_dfloat.codec import layout
from vllm_dfloat.device import fast_groups, fast_ops, groups, ops

NUM_X = [1, 16, 512]
Work = Callable[[], object]


def run(bench: Bench) -> None:
    shapes = bench.pick(list(LLAMA_8B.values()), [(3, 700), (1, 500)])
    case = f"group of {len(shapes)}, {sum(rows * cols for rows, cols in shapes)} weights"
    if not bench.begin("block", case):
        return
    weights = [normal(*shape, bench.device, seed=i) for i, shape in enumerate(shapes)]
    group = Group(weights)
    _decode(bench, case, group, 2 * sum(weight.numel() for weight in weights))
    if bench.is_gpu:
        _overlap(bench, weights, group.packed)
    else:
        bench.skip("overlap", case, "all", "needs a GPU")


def captured(work: Work) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of `work()`."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


class FastGroup:
    """As `Group`, in the fast layout."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights, device = weights, weights[0].device
        self._packed = [fast_ops.pack_again(weight, "w") for weight in weights]
        self._shapes = [(one.rows, one.cols) for one in self._packed]
        self._starts = fast_groups.first_tiles(self._shapes)
        self._out = poisoned(self._starts[-1] * layout.TILE_WEIGHTS, device)
        self._status = torch.zeros(self._starts[-1], dtype=torch.int32, device=device)
        self._table = fast_groups.group_table([one.desc for one in self._packed], self._shapes)

    def at_once(self) -> None:
        fast_groups.decode_group(self._table, self._shapes, self._out, self._status)

    def with_prmt(self, prmt: bool) -> None:
        """Do what `at_once` does in one form of the kernel; the plain one has no PRMT."""
        from vllm_dfloat.kernels.fast_group import decode_group

        sizes = self._starts[-1], self._shapes
        decode_group(self._table, *sizes, self._out, self._status, prmt=prmt)

    def check(self, what: str, work: Work | None = None) -> None:
        """Raise WrongBitsError unless `work`, by default `at_once`, fills memory of NaN with the weights."""
        self._out.view(torch.int16).fill_(-1)  # a NaN
        (work or self.at_once)()
        expect_no_status(self._status, what)
        for weight, start in zip(self._weights, self._starts, strict=False):
            found = self._out[start * layout.TILE_WEIGHTS :][: weight.numel()]
            expect_same_bits(found, weight, what)


class Group:
    """The matrices of a transformer block, which are decoded into one buffer, one after the other.

    Attributes:
        packed: the matrices, packed.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights, device = weights, weights[0].device
        self.packed = [ops.pack(weight, "w") for weight in weights]
        shapes = [(one.rows, one.cols) for one in self.packed]
        self._starts = groups.first_tiles(shapes)
        self._out = poisoned(self._starts[-1] * layout.TILE_WEIGHTS, device)
        self._status = torch.full((self._starts[-1],), -1, dtype=torch.int32, device=device)
        self._table = groups.group_table([one.desc for one in self.packed], shapes)

    def at_once(self) -> None:
        groups.decode_group(self._table, self._starts[-1], self._out, self._status)

    def one_by_one(self) -> None:
        for one, start in zip(self.packed, self._starts, strict=False):
            at = self._out[start * layout.TILE_WEIGHTS :]
            ops.decode(one.desc, one.rows, one.cols, at, self._status[start:])

    def check(self, what: str, work: Work | None = None) -> None:
        """Raise WrongBitsError unless `work`, by default `at_once`, fills memory of NaN with the weights."""
        self._out.view(torch.int16).fill_(-1)  # a NaN
        self._status.fill_(-1)
        (work or self.at_once)()
        expect_no_status(self._status, what)
        for weight, start in zip(self._weights, self._starts, strict=False):
            found = self._out[start * layout.TILE_WEIGHTS :][: weight.numel()]
            expect_same_bits(found, weight, what)


def _decode(bench: Bench, case: str, group: Group, bf16_bytes: int) -> None:
    work: dict[str, Work] = {
        "a launch per matrix": group.one_by_one,
        "one launch": group.at_once,
    }
    for name in list(work):
        if bench.is_gpu:
            work[f"{name}, CUDA graph"] = captured(work[name]).replay
        else:
            bench.skip("block", case, f"{name}, CUDA graph", "needs a GPU")
    for name, call in work.items():
        bench.compare(group.check, f"group, {name}", call)
    calls: dict[str, Call] = {name: ignoring(call) for name, call in work.items()}
    bench.measure("block", case, calls, 1, bf16_bytes)


def ignoring(work: Work) -> Call:
    """Return a call that ignores which set of inputs is asked for."""
    return lambda _: work()


def _overlap(
    bench: Bench, weights: Sequence[torch.Tensor], packed: Sequence[ops.PackedWeight]
) -> None:
    for num_x in NUM_X:
        case = f"4 matrices and their GEMMs, {num_x} rows"
        if not bench.begin("overlap", case):
            continue
        xs = [normal(num_x, one.cols, bench.device, seed=i) for i, one in enumerate(packed)]
        layers = Layers(packed, xs)
        outs = [functional.linear(x, weight) for x, weight in zip(xs, weights, strict=True)]
        plain = captured(lambda xs=xs, outs=outs: _gemms(xs, weights, outs))
        serial, ahead = captured(layers.serial), captured(layers.ahead)
        serial.replay()
        expected = [out.clone() for out in layers.outs]
        for out in layers.outs:
            out.view(torch.int16).fill_(-1)  # a NaN
        ahead.replay()
        for found, wanted in zip(layers.outs, expected, strict=True):
            bench.compare(expect_same_bits, found, wanted, f"overlap, {case}")
        calls: dict[str, Call] = {
            "GEMMs on BF16": ignoring(plain.replay),
            "decode, then GEMM": ignoring(serial.replay),
            "decode ahead": ignoring(ahead.replay),
        }
        bench.measure("overlap", case, calls, 1, 2 * sum(weight.numel() for weight in weights))


def _gemms(
    xs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]
) -> None:
    for x, weight, out in zip(xs, weights, outs, strict=True):
        torch.mm(x, weight.T, out=out)


class Layers:
    """Matrices that are decoded and multiplied one after the other, in two ways.

    Attributes:
        outs: the result for each matrix of the last work or replay.
    """

    def __init__(self, packed: Sequence[ops.PackedWeight], xs: Sequence[torch.Tensor]) -> None:
        self._packed, self._xs = packed, xs
        device = xs[0].device
        largest = max(packed, key=lambda one: one.rows * one.cols)
        self._buffers = [scratch_for(largest.rows, largest.cols, device) for _ in range(2)]
        self._side = torch.cuda.Stream(device)
        self.outs = [
            torch.empty(len(x), one.rows, dtype=torch.bfloat16, device=device)
            for x, one in zip(xs, packed, strict=True)
        ]

    def _decode(self, k: int, buffer: int) -> None:
        one = self._packed[k]
        ops.decode(one.desc, one.rows, one.cols, *self._buffers[buffer])

    def _gemm(self, k: int, buffer: int) -> None:
        one = self._packed[k]
        weight = self._buffers[buffer][0][: one.rows * one.cols].view(one.rows, one.cols)
        torch.mm(self._xs[k], weight.T, out=self.outs[k])

    def serial(self) -> None:
        for k in range(len(self._packed)):
            self._decode(k, 0)
            self._gemm(k, 0)

    def ahead(self) -> None:
        """Decode matrix k + 1 on the side stream while the GEMM of matrix k runs on the current one."""
        main = torch.cuda.current_stream()
        self._decode(0, 0)
        for k in range(len(self._packed)):
            self._side.wait_stream(main)  # after the last GEMM that reads this buffer
            if k + 1 < len(self._packed):
                with torch.cuda.stream(self._side):
                    self._decode(k + 1, (k + 1) % 2)
            self._gemm(k, k % 2)
            main.wait_stream(self._side)
