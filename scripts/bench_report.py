"""Write measured rows as a table for people and as JSON for the record."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_setup import ROOT

HEADS = ("section", "case", "name", "us", "ratio", "of_copy", "gb_per_s", "bits_per_weight")


def default_path(device_name: str, kind: str) -> Path:
    """Return where results of a GPU belong: scripts/results/<gpu>/<kind>-<date>.json."""
    folder = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return ROOT / "scripts/results" / folder / f"{kind}-{time.strftime('%Y-%m-%d')}.json"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned text; `ratio` is to the first contender of a case, where 1 is its time."""
    lines = [list(HEADS)]
    for row in rows:
        cells = [str(row[head]) for head in HEADS[:3]]
        if "not_measured" in row:
            cells.append(f"not measured: {row['not_measured']}")
        else:
            cells += [str(row.get(head, "")) for head in HEADS[3:]]
        lines.append(cells)
    widths = [
        max(len(line[i]) for line in lines if len(line) > 4 or i < 3) for i in range(len(HEADS))
    ]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )
    return "\n".join(padded)


def write(path: Path, environment: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps({"environment": environment, "rows": list(rows)}, indent=1)
    part.write_text(text + "\n")
    part.replace(path)
