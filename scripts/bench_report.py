"""Measured rows as lines of a table for people, and as JSON for the record.

python scripts/bench_report.py FACTS    # the folder under results/ for the GPU that bench_setup.py's line names
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_setup import ROOT

HEADS = ("section", "case", "name", "us", "ratio", "of_copy", "gb_per_s", "bits_per_weight")


def default_path(device_name: str, kind: str) -> Path:
    """Return the path for results of a GPU: scripts/results/<gpu>/<kind>-<date>.json."""
    file = f"{kind}-{time.strftime('%Y-%m-%d')}.json"
    return ROOT / "scripts/results" / folder_name(device_name) / file


def folder_name(device_name: str) -> str:
    """Return a GPU's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _in_columns(cells: Iterable[str]) -> str:
    widths = (11, 42, 34, 10, 7, 7, 8, 15)
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
    return "  ".join(padded).rstrip()


HEAD = _in_columns(HEADS)


def line(row: Mapping[str, Any]) -> str:
    """Return a row as text with the columns of `HEAD`; `ratio` is the time relative to the case's first contender."""
    if "found" in row:
        return _in_columns([*(str(row[head]) for head in HEADS[:3]), row["found"]])
    if "not_measured" in row:
        reason = f"not measured: {row['not_measured']}"
        return _in_columns([*(str(row[head]) for head in HEADS[:3]), reason])
    text = _in_columns(str(row.get(head, "")) for head in HEADS)
    return f"{text}  WRONG BITS: {row['wrong_bits']}" if "wrong_bits" in row else text


def write(path: Path, environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps({"environment": environment, "rows": list(rows)}, indent=1)
    part.write_text(text + "\n")
    part.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("facts", type=json.loads, help="the line of bench_setup.py, JSON")
    print(folder_name(parser.parse_args().facts["device"]))
