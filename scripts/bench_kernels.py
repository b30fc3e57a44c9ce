"""Measure every kernel on a GPU, beside copies of the same bytes, cuBLAS and other decoders; bits are compared first.

    python scripts/bench_kernels.py [--seconds 150] [--only SECTION ...] [--output FILE]
    python scripts/bench_kernels.py --device cpu    # a rehearsal in Triton's interpreter; its times mean nothing

Prints a table and writes scripts/results/<gpu>/kernels-<date>.json. Exit status 0; 1 if a kernel's bits are wrong, and
then no time is printed, or if a part failed; 2 if it cannot run here. A peer that is missing is a line in the table.
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
    from bench_timing import Bench

SECTIONS = {  # what is wanted most comes first: time may run out
    "decode": ("bench_decode", "run"),
    "fused": ("bench_fused", "run"),
    "layouts": ("bench_units", "run"),
    "block": ("bench_blocks", "run"),
    "encode": ("bench_decode", "run_encode"),
    "decode_rows": ("bench_decode", "run_rows"),
}
ROUNDS = 21


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150, help="begin no case after so long")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="the JSON file; by default under results/")
    return parser.parse_args(argv)


def measure(bench: Bench, sections: Sequence[str]) -> list[str]:
    """Run the sections; return what failed, a sentence each.

    Raises:
        WrongBitsError: a kernel's output is wrong.
    """
    from bench_timing import WrongBitsError

    failures = []
    for name in sections:
        module, function = SECTIONS[name]
        try:
            getattr(importlib.import_module(module), function)(bench)
        except WrongBitsError:
            raise
        except Exception as error:  # one part that fails must not cost the others' numbers
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    begun = time.monotonic()
    try:
        device = prepare(args.device)
    except CannotRunError as error:
        print(f"bench_kernels: cannot run: {error}", file=sys.stderr)
        return 2
    from bench_timing import Bench, WrongBitsError

    facts: dict[str, Any] = environment(device)
    rounds = ROUNDS if device.type == "cuda" else 1
    bench = Bench(device, rounds, begun + args.seconds)
    try:
        failures = measure(bench, args.only)
    except WrongBitsError as error:
        print(f"bench_kernels: wrong bits: {error}; no time is reported", file=sys.stderr)
        return 1
    print(
        f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}"
    )
    print(bench_report.table(bench.rows))
    path = args.output
    if path is None and device.type == "cuda":
        path = bench_report.default_path(facts["device"], "kernels")
    if path is not None:
        bench_report.write(path, facts | {"failures": failures}, bench.rows)
        print(f"written: {path}")
    for failure in failures:
        print(f"bench_kernels: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
