"""Choose, from what was measured, how products with the fast layout are launched on a GPU; print the table.

    python scripts/bench_kernels.py --only fast_fused --output FILE
    python scripts/choose_products.py FILE

Prints the best product of each case beside cuBLAS, and a FastProduct for kernels/configs.py. For a number of rows of
activations, and for large and other matrices each, the launch is chosen that takes the smallest part of cuBLAS' time on
average, unless decoding and cuBLAS together take less; beyond the first number for which they do, nothing is chosen.
Exit status 0; 1 if no row can be used; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

LARGE = 16_384  # rows from which a matrix is large
CASE = re.compile(r"(?P<name>.+) (?P<rows>\d+) x (?P<cols>\d+), (?P<num_x>\d+) rows")
CUBLAS, DECODE = "cuBLAS on BF16", "decode, then cuBLAS"


@dataclass
class Case:
    """A matrix [rows, cols] and a number of rows of activations, with each contender's time as a part of cuBLAS'."""

    name: str
    rows: int
    cols: int
    num_x: int
    ratios: dict[str, float] = field(default_factory=dict)


def cases_of(rows: Iterable[dict[str, Any]]) -> list[Case]:
    """Return the cases that were measured, without rows whose bits were wrong."""
    found: dict[str, Case] = {}
    for row in rows:
        match = CASE.fullmatch(row.get("case", ""))
        is_measured = row.get("section") == "fast_fused" and "ratio" in row
        if match is None or not is_measured or "wrong_bits" in row:
            continue
        numbers = (int(match[part]) for part in ("rows", "cols", "num_x"))
        case = found.setdefault(row["case"], Case(match["name"], *numbers))
        case.ratios[row["name"]] = row["ratio"]
    return list(found.values())


def choose(cases: Sequence[Case], num_x: int, from_rows: int) -> Any:
    """Return the Choice for `num_x` rows of activations that is best on average, or None if decoding is.

    A launch that was not measured for each case is not considered.
    """
    from bench.kernels import fast_fused

    from vllm_dfloat.kernels.fast_product import Choice, FastProduct

    best, least = None, geometric_mean([case.ratios.get(DECODE, float("inf")) for case in cases])
    for warps in fast_fused.WARPS:
        for shape in fast_fused.TRIED.get(num_x, ()):
            choice = Choice(num_x, shape, warps // shape.warps, from_rows, measured=True)
            table = FastProduct((choice,))
            launched = [
                table.launch_shape(max(case.rows, from_rows), case.cols, num_x) for case in cases
            ]
            names = [fast_fused.name_of(each) for each in launched]
            ratios = [case.ratios.get(name) for case, name in zip(cases, names, strict=True)]
            known = [ratio for ratio in ratios if ratio is not None]
            if len(known) == len(cases) and geometric_mean(known) < least:
                best, least = choice, geometric_mean(known)
    return best


def table_of(cases: Sequence[Case]) -> list[Any]:
    """Return the lines of a FastProduct, those for large matrices before others for as many rows of activations."""
    lines = []
    for from_rows in (LARGE, 0):
        for num_x in sorted({case.num_x for case in cases}):
            mine = [c for c in cases if c.num_x == num_x and (c.rows >= LARGE) == bool(from_rows)]
            choice = choose(mine, num_x, from_rows) if mine else None
            if choice is None:
                break
            lines.append(choice)
    return sorted(lines, key=lambda line: (line.up_to, -line.from_rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON that bench_kernels.py has written")
    args = parser.parse_args(argv)
    try:
        found = json.loads(args.file.read_text())
        cases = cases_of(found["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{args.file}: {error}; expected the JSON of scripts/bench_kernels.py")
    if not cases:
        what = "no row of fast_fused was measured; run bench_kernels.py --only fast_fused"
        print(f"{args.file}: {what}", file=sys.stderr)
        return 1
    print(found.get("environment", {}).get("device", ""))
    for case in cases:
        ratios = {name: ratio for name, ratio in case.ratios.items() if name != CUBLAS}
        best = min(ratios, key=ratios.__getitem__, default=CUBLAS)
        told = f"{ratios.get(best, 1):.2f} of cuBLAS' time  {best}"
        print(f"{case.name} {case.rows} x {case.cols}, {case.num_x} rows: {told}")
    lines = "".join(f"        {line!r},\n" for line in table_of(cases))
    print(f"FastProduct(\n    (\n{lines}    )\n)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
