"""Measure every kernel on a GPU, beside copies of the same bytes, cuBLAS and other decoders; bits are compared first.

    python scripts/bench_kernels.py [--seconds 150] [--only SECTION ...] [--output FILE]
    python scripts/bench_kernels.py --device cpu    # a rehearsal in Triton's interpreter; its times mean nothing

Prints each row, and writes it to scripts/results/<gpu>/kernels-<date>.json, as soon as it is measured. If bits are
wrong, the rows of the case are marked. Exit status 0; 1 if a kernel's bits are wrong or a section failed; 2 if it
cannot run here. A missing peer is a line in the table.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bench_report
from bench_setup import CannotRunError, environment, prepare

if TYPE_CHECKING:
    from bench.kernels.timing import Bench

SECTIONS = {  # the most important come first: time may run out
    "decode": ("bench.kernels.decode", "run"),
    "encode": ("bench.kernels.decode", "run_encode"),
    "fused": ("bench.kernels.fused", "run"),
    "fast": ("bench.kernels.fast_decode", "run"),
    "fast_fused": ("bench.kernels.fast_fused", "run"),
    "experts_fused": ("bench.kernels.experts_fused", "run"),
    "experts": ("bench.kernels.experts", "run"),
    "block": ("bench.kernels.groups", "run"),
    "decode_rows": ("bench.kernels.decode", "run_rows"),
    "layouts": ("bench.kernels.units", "run"),
    "runs": ("bench.kernels.runs", "run"),
    "slabs": ("bench.kernels.slabs", "run"),
    "in_order": ("bench.kernels.in_order", "run"),
}
SHARES = {
    "decode": 2,
    "fast_fused": 4,
    "experts_fused": 2,
}  # of the time that is left, others 1; what one does not use, later ones may
ROUNDS = 21


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--seconds",
        type=float,
        default=150,
        help="begin no case after so long, and none of a section after its share",
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--sizes",
        choices=("first", "rest", "all"),
        default="all",
        help="of decode, fast and encode: the three most important sizes, or the others, and rows",
    )
    parser.add_argument("--output", type=Path, help="the JSON file; by default under results/")
    return parser.parse_args(argv)


def measure(bench: Bench, sections: Sequence[str]) -> list[str]:
    """Run the sections, each within its share of the time; return one sentence per failure."""
    failures = []
    end = bench.deadline
    for index, name in enumerate(sections):
        total = sum(SHARES.get(other, 1) for other in sections[index:])
        now = time.monotonic()
        bench.deadline = now + (end - now) * SHARES.get(name, 1) / total
        module, function = SECTIONS[name]
        try:
            getattr(importlib.import_module(module), function)(bench)
        except Exception as error:  # a failed section must not stop the others
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    return failures


def output_path(given: Path | None, facts: dict[str, Any], is_gpu: bool) -> Path | None:
    """Return the path of the JSON file; None for a rehearsal without --output."""
    if given is None and is_gpu:
        return bench_report.default_path(facts["device"], "kernels")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    begun = time.monotonic()
    try:
        device = prepare(args.device)
    except CannotRunError as error:
        print(f"bench_kernels: cannot run: {error}", file=sys.stderr)
        return 2
    from bench.kernels.timing import Bench

    is_gpu = device.type == "cuda"
    facts: dict[str, Any] = environment(device)
    print(
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}"
    )
    print(bench_report.HEAD, flush=True)
    path = output_path(args.output, facts, is_gpu)

    def report(row: dict[str, Any]) -> None:
        print(bench_report.line(row), flush=True)
        if path is not None:
            bench_report.write(path, facts, bench.rows)

    rounds, deadline = ROUNDS if is_gpu else 1, begun + args.seconds
    bench = Bench(device, rounds, deadline, report, args.sizes)
    failures = measure(bench, args.only)
    if path is not None:
        more = {"failures": failures, "wrong_bits": bench.wrong}
        bench_report.write(path, facts | more, bench.rows)
        print(f"written: {path}")
    for sentence in bench.wrong:
        print(f"bench_kernels: wrong bits: {sentence}", file=sys.stderr)
    for failure in failures:
        print(f"bench_kernels: failed: {failure}", file=sys.stderr)
    return 1 if failures or bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
