"""Damage checkpoints in every way, and see that each is refused in a sentence or decodes to what its bytes say.

python scripts/fuzz_checkpoints.py --count 100000 --seed 1     # a night's run; cases 0..99999 of seed 1
python scripts/fuzz_checkpoints.py --count 1000 --start 5000 --seed 1   # continues a run that was interrupted
python scripts/fuzz_checkpoints.py --seed 1 --only 4711        # one case again, with its message or traceback

Exit status 0: every case ended as it must; 1: some did not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["VLLM_DFLOAT_THREADS"] = "1"  # children are forks, and each has one core

from fuzz.bases import make_bases
from fuzz.case import damaged, run_case, self_check
from fuzz.folder import write_folder
from fuzz.mutations import MUTATIONS
from fuzz.supervise import Report, supervise

WALL_SECONDS = 60
EVERY = 5000  # cases per line of progress
MAX_SHOWN = 20


def main() -> int:
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        root = Path(name)
        bases = make_bases(root / "bases")
        self_check(bases, root)
        began = time.monotonic()

        def run(case: int, worker: int) -> Report:
            return run_case(case, args.seed, bases, root / f"worker{worker}").as_json()

        if args.only is not None:
            if args.keep:
                write_folder(damaged(args.only, args.seed, bases)[1], args.keep)
            reports = list(supervise(run, [args.only], 1, WALL_SECONDS))
            print(json.dumps(reports[0], indent=1))
            return int(reports[0]["result"] == "wrong")
        for number in (signal.SIGINT, signal.SIGTERM):  # also if a shell ignores them
            signal.signal(number, signal.default_int_handler)
        cases = range(args.start, args.start + args.count)
        totals = Totals(args.start)
        try:
            for report in supervise(run, cases, args.workers, WALL_SECONDS):
                totals.add(report)
                if totals.cases % EVERY == 0:
                    print(
                        f"{totals.cases} cases, {len(totals.wrong)} wrong, {time.monotonic() - began:.0f} s; "
                        f"--start {totals.next} goes on here",
                        file=sys.stderr,
                        flush=True,
                    )
        except KeyboardInterrupt:
            print(f"interrupted; --start {totals.next} goes on here", file=sys.stderr)
    seconds = time.monotonic() - began
    if args.json:
        args.json.write_text(json.dumps(totals.as_json(args.seed, args.start, seconds), indent=1))
    print(totals.as_table(args.seed, seconds))
    return int(bool(totals.wrong))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="cases (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone, and print it")
    parser.add_argument(
        "--keep", type=Path, help="with --only: also write its files to this folder"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the counts and the wrong cases there")
    return parser.parse_args()


class Totals:
    """Counts per mutation and outcome. A case with several mutations counts for each of them."""

    def __init__(self, start: int) -> None:
        self.cases = 0
        self.next = start  # every case before this one has ended
        self._ahead: set[int] = set()
        self.results: Counter[str] = Counter()
        self.kinds: Counter[tuple[str, str]] = Counter()
        self.wrong: list[Report] = []

    def add(self, report: Report) -> None:
        self.cases += 1
        self._ahead.add(report["number"])
        while self.next in self._ahead:
            self._ahead.remove(self.next)
            self.next += 1
        self.results[report["result"]] += 1
        self.kinds.update((kind, report["result"]) for kind in set(report["kinds"]))
        if report["result"] == "wrong":
            self.wrong.append(report)

    def as_json(self, seed: int, start: int, seconds: float) -> dict[str, Any]:
        kinds = {
            kind: {result: self.kinds[kind, result] for result in ("refused", "decoded", "wrong")}
            for kind in MUTATIONS
        }
        return {
            "seed": seed,
            "start": start,
            "cases": self.cases,
            "seconds": round(seconds, 1),
            "results": dict(self.results),
            "mutations": kinds,
            "wrong": self.wrong,
        }

    def as_table(self, seed: int, seconds: float) -> str:
        lines = [f"{'mutation':40}{'refused':>9}{'decoded':>9}{'wrong':>7}"]
        for kind in sorted(MUTATIONS):
            counts = [self.kinds[kind, result] for result in ("refused", "decoded", "wrong")]
            lines.append(f"{kind:40}{counts[0]:9}{counts[1]:9}{counts[2]:7}")
        for report in self.wrong[:MAX_SHOWN]:
            lines.append(
                f"\ncase {report['number']} ({report['base']}; {', '.join(report['kinds'])}): {report['told']}"
            )
            lines.append(
                f"again: python scripts/fuzz_checkpoints.py --seed {seed} --only {report['number']}"
            )
        counts_ = ", ".join(f"{count} {result}" for result, count in sorted(self.results.items()))
        lines.append(f"\nseed {seed}: {self.cases} cases, {counts_}, {seconds:.0f} s")
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
