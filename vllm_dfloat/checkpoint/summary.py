"""The contents of a checkpoint on disk: which modules are compressed, and how many bits a weight takes."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_KEY, is_dfloat11
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.checkpoint.reader import open_checkpoint

COMPRESSED, PLAIN = "dfloat11", "plain"


@dataclass(frozen=True)
class Row:
    """One unit, or one tensor that is not compressed.

    Attributes:
        name: module path of a unit, or tensor name.
        kind: "dfloat11" or "plain".
        members: weights that share the unit's stream.
        weights: number of elements.
        num_bytes: bytes on disk, all metadata included.
        bf16_bytes: bytes without compression; for a plain tensor the same as num_bytes.
    """

    name: str
    kind: str
    members: int
    weights: int
    num_bytes: int
    bf16_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Summary:
    """All rows of a checkpoint, units first, and their totals."""

    path: str
    rows: list[Row]

    def total(self, kind: str | None = None) -> Row:
        """Return the sum over the rows of one kind, or over all."""
        rows = (row for row in self.rows if kind in (None, row.kind))
        return _sum("total", kind or "all", rows)

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in self.rows]
        totals = {}
        for kind in (COMPRESSED, PLAIN, None):
            total = self.total(kind)
            totals[total.kind] = {
                **{field: getattr(total, field) for field in _SUMMED},
                "bits_per_weight": total.bits_per_weight,
            }
        return {"path": self.path, "modules": rows, "totals": totals}

    def as_table(self) -> list[str]:
        """Return a table as lines, with one row for repeated tensors, and a last line that sums it up."""
        heads = ["module", "kind", "count", "members", "weights", "bytes", "bits/weight", "of BF16"]
        groups = grouped(self.rows)
        body = [_cells(row, count) for row, count in groups]
        for kind in (COMPRESSED, PLAIN, None):
            count = sum(kind in (None, row.kind) for row in self.rows)
            body.append(_cells(self.total(kind), count))
        widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
        lines = []
        for line in [heads, *body]:
            left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        lines.insert(len(groups) + 1, "-" * len(lines[0]))
        units = self.total(COMPRESSED)
        if not units.weights:
            lines.append(
                f"{self.path}: nothing is compressed on disk (no {CONFIG_KEY} in config.json or a header)"
            )
        else:
            lines.append(
                f"{self.path}: {len(self.rows) - sum(r.kind == PLAIN for r in self.rows)} units compressed, "
                f"{units.bits_per_weight:.3f} bits per weight; {self.total().num_bytes:,} bytes in all "
                f"against {self.total().bf16_bytes:,} uncompressed"
            )
        return lines


_SUMMED = ("members", "weights", "num_bytes", "bf16_bytes")


def grouped(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Return rows in order, each with a count: rows that a model repeats are summed into one.

    Plain tensors repeat if they have the same size and names that differ in numbers only, as the norms of all layers.
    Units repeat if their names differ in the last of several numbers only, as the experts of a layer.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(row)
    return [
        (same[0] if len(same) == 1 else _sum(key[0], same[0].kind, same), len(same))
        for key, same in groups.items()
    ]


def _group(row: Row) -> tuple[Any, ...]:
    """Return the name of the row for all rows like this one, with * for numbers, and what they have in common."""
    parts = row.name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if row.kind == COMPRESSED:
        numbers = numbers[1:][-1:]
    for i in numbers:
        parts[i] = "*"
    sizes = () if row.kind == COMPRESSED else (row.weights, row.num_bytes)
    return ".".join(parts), row.kind, *sizes


def _sum(name: str, kind: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    return Row(name, kind, *(sum(getattr(row, field) for row in rows) for field in _SUMMED))


def _cells(row: Row, count: int) -> list[str]:
    ratio = f"{100 * row.num_bytes / row.bf16_bytes:.1f} %" if row.bf16_bytes else "-"
    bits = f"{row.bits_per_weight:.3f}" if row.weights else "-"
    return [
        row.name,
        row.kind,
        f"{count:,}",
        f"{row.members:,}",
        f"{row.weights:,}",
        f"{row.num_bytes:,}",
        bits,
        ratio,
    ]


def summarize(path: Path) -> Summary:
    """Return the contents of the checkpoint in directory `path`. Reads headers and small tables, decodes nothing.

    Raises:
        FormatError: the directory is no safetensors checkpoint, or a file is damaged.
        UnsupportedError: a legacy DFloat11 layout.
    """
    if not is_dfloat11(path):
        plain, units = bf16_tensors(path), {}
    else:
        checkpoint = open_checkpoint(path)
        checkpoint.validate()
        plain, units = dict(checkpoint.plain), dict(checkpoint.units)
    rows = [
        Row(
            name,
            COMPRESSED,
            unit.num_members,
            unit.num_weights,
            unit.num_bytes,
            2 * unit.num_weights,
        )
        for name, unit in units.items()
    ]
    rows += [
        Row(name, PLAIN, 1, math.prod(tensor.shape), tensor.num_bytes, tensor.num_bytes)
        for name, tensor in plain.items()
    ]
    return Summary(str(path), rows)
