"""Values out of a report of the serving benchmark, for its table and its plots."""

from typing import Any

GIB = 1 << 30

Json = dict[str, Any]


def point_name(point: Json) -> str:
    return f"decode {point['batch']}" if point["kind"] == "decode" else str(point["kind"])


def memory_unit(variants: Json) -> tuple[str, int]:
    """Return a memory unit that suits the weights of these variants, and its size in bytes."""
    sizes = [v["memory"]["resident_bytes"] for v in variants.values() if "memory" in v]
    return ("GiB", GIB) if max(sizes) >= GIB else ("MiB", GIB >> 10)


def count_runs(whole: Json) -> str:
    runs = whole["settings"]["runs"]
    return f"{runs} run{'s' * (runs != 1)}"


def point_of(variant: Json, name: str) -> Json:
    """Return a variant's point of this name, or an empty one."""
    return next((p for p in variant.get("points", []) if point_name(p) == name), {})
