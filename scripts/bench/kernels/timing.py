"""Time kernels: compare the bits first, then take medians of interleaved calls over rotating inputs.

A round calls each contender in turn, the next round in the opposite order, so that a drifting clock affects all alike.
A contender's turn is one call per set of inputs; the sets together are larger than twice the L2 cache. On a GPU all
turns of a round are queued after a delay, so that the time between two events is device time without late launches of
the host. Reported are the median over rounds, and the median of the ratio within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Call = Callable[[int], Any]  # the argument is the number of the set of inputs
T = TypeVar("T")

MAX_SETS = 48  # a turn must fit into the queue of launches
FIRST_SIZES = 3  # of matrices, that a short visit measures
FLOOR = "copy of the bytes read and written"
FASTEST_CLOCK = 2.2e9  # Hz; with it, a delay in cycles lasts at least the seconds asked for


class WrongBitsError(Exception):
    """A kernel's output is wrong."""


@dataclass
class Bench:
    """The device, the time limit, and the rows measured so far.

    Attributes:
        device: a CUDA device, or the CPU for a rehearsal in Triton's interpreter.
        rounds: turns of each contender.
        deadline: `time.monotonic()` after which no further case begins.
        on_row: called with each row as soon as it is known.
        sizes: of the sizes of matrices "first" (three), "rest" or "all".
        rows: one per contender and case.
        wrong: one sentence for every failed comparison of bits.
    """

    device: torch.device
    rounds: int
    deadline: float
    on_row: Callable[[dict[str, Any]], None] = lambda row: None
    sizes: str = "all"
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _marks: list[str] = field(default_factory=list)  # errors of the current case

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, gpu: T, cpu: T) -> T:
        """Return `gpu` on a GPU, else `cpu`, a small value for a rehearsal."""
        return gpu if self.is_gpu else cpu

    def of_sizes(self, gpu: Sequence[T], cpu: Sequence[T]) -> Sequence[T]:
        """Return those of `gpu` or `cpu`, as `pick` does, that `sizes` asks for."""
        parts = {"first": slice(FIRST_SIZES), "rest": slice(FIRST_SIZES, None), "all": slice(None)}
        return self.pick(gpu, cpu)[parts[self.sizes]]

    def num_sets(self, bytes_per_call: int) -> int:
        """Return how many sets of inputs exceed twice the L2 cache, if a call reads and writes `bytes_per_call`."""
        if not self.is_gpu:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(MAX_SETS, -(-2 * cache // max(1, bytes_per_call))))

    def begin(self, section: str, case: str) -> bool:
        """Return whether there is time for a case; if not, record that it was not measured."""
        self._marks = []
        if time.monotonic() < self.deadline:
            return True
        self.skip(section, case, "all", "out of time")
        return False

    def compare(self, check: Callable[..., None], *arguments: Any) -> None:
        """Run `check(*arguments)`; if bits are wrong, every row of the case is marked, but still measured."""
        try:
            check(*arguments)
        except WrongBitsError as error:
            self._marks.append(str(error))
            self.wrong.append(str(error))

    def skip(self, section: str, case: str, name: str, reason: str) -> None:
        self._add({"section": section, "case": case, "name": name, "not_measured": reason})

    def tell(self, section: str, case: str, name: str, found: str) -> None:
        """Add a row that holds a finding instead of a time."""
        self._add({"section": section, "case": case, "name": name, "found": found})

    def _add(self, row: dict[str, Any]) -> None:
        if self._marks:
            row["wrong_bits"] = "; ".join(self._marks)
        self.rows.append(row)
        self.on_row(row)

    def measure(
        self,
        section: str,
        case: str,
        calls: Mapping[str, Call],
        num_sets: int = 1,
        bf16_bytes: int | None = None,
        facts: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Time the contenders and add a row for each; ratios are to the first contender.

        If the first contender is FLOOR, a copy of the bytes that must at least be read and written, rows also hold the
        reached fraction of its speed (`of_copy`).

        Args:
            section, case: stored in the rows.
            calls: the call of each contender; their bits have been compared before, with `compare`.
            num_sets: number of sets of inputs; calls get 0 to num_sets - 1.
            bf16_bytes: bytes of BF16 weights that a call reads or writes, for GB/s.
            facts: further fields of the rows, per contender.
        """
        seconds = self._seconds(calls, num_sets)
        first = seconds[next(iter(calls))]
        for name in calls:
            median = statistics.median(seconds[name])
            ratios = [mine / other for mine, other in zip(seconds[name], first, strict=True)]
            row = {"section": section, "case": case, "name": name, "us": round(median * 1e6, 2)}
            row["ratio"] = round(statistics.median(ratios), 4)
            if next(iter(calls)) == FLOOR:
                row["of_copy"] = float(f"{1 / statistics.median(ratios):.4g}")
            if bf16_bytes is not None:
                row["gb_per_s"] = round(bf16_bytes / median / 1e9, 1)
            self._add(row | dict((facts or {}).get(name, {})))

    def _seconds(self, calls: Mapping[str, Call], num_sets: int) -> dict[str, list[float]]:
        order = list(calls.items())
        host_seconds = 0.0
        # The first pass compiles, the second measures how long the host takes to queue a round.
        for _ in range(self.pick(2, 0)):
            begun = time.perf_counter()
            for _, call in order:
                for i in range(num_sets):
                    call(i)
            host_seconds = time.perf_counter() - begun
            self._wait()
        turn = _gpu_round if self.is_gpu else _cpu_round
        found: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(self.rounds):
            for name, seconds in turn(order[:: 1 if index % 2 else -1], num_sets, host_seconds):
                found[name].append(seconds)
        return found

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def _gpu_round(
    order: list[tuple[str, Call]], num_sets: int, host_seconds: float
) -> list[tuple[str, float]]:
    torch.cuda._sleep(int(1.5 * host_seconds * FASTEST_CLOCK) + 1)
    marks = []
    for name, call in order:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(num_sets):
            call(i)
        end.record()
        marks.append((name, begin, end))
    torch.cuda.synchronize()
    return [(name, begin.elapsed_time(end) / 1e3 / num_sets) for name, begin, end in marks]


def _cpu_round(
    order: list[tuple[str, Call]], num_sets: int, host_seconds: float
) -> list[tuple[str, float]]:
    found = []
    for name, call in order:
        begun = time.perf_counter()
        for i in range(num_sets):
            call(i)
        found.append((name, (time.perf_counter() - begun) / num_sets))
    return found


def expect_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise WrongBitsError unless two BF16 tensors have the same bits."""
    a, b = found.reshape(-1).view(torch.int16), expected.reshape(-1).view(torch.int16)
    if a.shape == b.shape and torch.equal(a, b):
        return
    wrong = int((a != b).sum()) if a.shape == b.shape else a.numel()
    raise WrongBitsError(f"{what}: {wrong} of {b.numel()} weights differ from the original ones")


def expect_no_status(status: torch.Tensor, what: str) -> None:
    """Raise WrongBitsError if a decoder reports an error for correct codes."""
    if status.any():
        raise WrongBitsError(f"{what}: {int((status != 0).sum())} status words are not 0")
