"""The numbers of docs/benchmarks.md are equal to those of the raw results that it names."""

import json
import statistics
from decimal import ROUND_HALF_UP, Decimal
from math import prod
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    if line.startswith("| ")
]


def raw(name: str) -> Any:
    return json.loads((ROOT / "scripts" / "results" / name).read_text())


def rounded(value: float) -> str:
    """Return a number with one digit after the point."""
    return str(Decimal(str(value)).quantize(Decimal("0.1"), ROUND_HALF_UP))


def row(what: str) -> str:
    """Return the cells after the first of the only row that begins with `what`."""
    (found,) = (cells for cells in ROWS if cells[0].startswith(what))
    return " | ".join(found[1:])


def kernel(name: str, triton: str = "3.9") -> dict[str, Any]:
    rows = raw(f"no-gpu/kernel-report-triton-{triton}.json")["kernels"]
    (found,) = (row for row in rows if (row["kernel"], row["target"]) == (name, "sm_90"))
    return found


def seconds(kind: str) -> str:
    times = raw("epyc/load-1b.json")["seconds"][kind]
    return " / ".join(rounded(statistics.median(times[state])) for state in ("cold", "warm"))


def peak(name: str, digits: int) -> str:
    ranks = raw(name)["ranks"]
    assert all(rank["peak_bytes"] <= rank["bound_bytes"] for rank in ranks)
    return f"{max(rank['extrapolated_peak_bytes'] for rank in ranks) / 2**30:.{digits}f} GiB"


CODEC = [raw(f"epyc/codec-{run}.json") for run in (1, 2)]
QUIET = [raw(f"epyc/codec-{run}.json") for run in (3, 4)]
FAST = [run["fast"] for run in QUIET]


def speeds(runs: list[dict[str, Any]], what: str) -> str:
    return " and ".join(f"{run[f'{what}_mb_per_s']:,}" for run in runs)


COMPRESS, LAYER = raw("epyc/compress.json"), raw("epyc/compress-405b-layer.json")["compress"]
ENCODE = [f"encode_{step}" for step in ("count", "measure", "write")]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("bits per weight", f"{CODEC[0]['bits_per_weight']:.3f}"),
        ("encode, two runs", " and ".join(str(run["encode_mb_per_s"]) for run in CODEC)),
        ("decode, same runs", " and ".join(str(run["decode_mb_per_s"]) for run in CODEC)),
        ("packed: encode", speeds(QUIET, "encode")),
        ("packed: decode", speeds(QUIET, "decode")),
        ("fast layout: encode", speeds(FAST, "encode")),
        ("fast layout: decode", speeds(FAST, "decode")),
        ("`compress`, end to end", f"{COMPRESS['compress']['mb_per_cpu_s']:.0f} MB/s"),
        ("`compress`, end to end", f"{COMPRESS['compress']['peak_mib']} MiB"),
        ("`decompress`, likewise", f"{COMPRESS['decompress']['mb_per_cpu_s']:.0f} MB/s"),
        ("`decompress`, likewise", f"{COMPRESS['decompress']['peak_mib']} MiB"),
        ("`compress`, one unit of 6.4 GB", f"{LAYER['mb_per_cpu_s']:.0f} MB/s"),
        ("`compress`, one unit of 6.4 GB", f"{LAYER['peak_mib']} MiB"),
        ("seconds on 2 cores", seconds("BF16 vLLM")),
        ("the same, compressed while loading", seconds("compressed while loading")),
        ("the same, official checkpoint", seconds("official checkpoint")),
        ("peak while loading one rank", peak("epyc/load-405b.json", 1)),
        ("peak while loading a rank", peak("xeon-amx/load-235b-tp8.json", 2)),
        ("the same at EP 8", peak("xeon-amx/load-235b-ep8.json", 2)),
        ("decode a layer", "; ".join(rounded(loop) for loop in kernel('decode')['of_each_loop'])),
        ("decode a group", "; ".join(rounded(loop) for loop in kernel('decode_group')['of_each_loop'])),
        ("decode chosen experts of 128", "; ".join(rounded(loop) for loop in kernel('decode_chosen')['of_each_loop'])),
        ("fused, packed, in", "; ".join(rounded(kernel(name)['of_each_loop'][0]) for name in ("gemv_1", "gemv_4"))),
        ("encode: count", ", ".join(rounded(kernel(name)['instructions_per_weight']) for name in ENCODE)),
        ("encode: count", ", ".join(rounded(kernel(name, '3.6')['instructions_per_weight']) for name in ENCODE)),
    ],
)  # fmt: skip
def test_a_number_is_that_of_its_raw_result(what: str, expected: str) -> None:
    assert expected in row(what)


def test_the_document_of_the_fast_layout_has_the_same_speeds() -> None:
    text = (ROOT / "docs" / "fast-layout.md").read_text()
    for what in ("encode", "decode"):
        assert speeds(FAST, what) in text


def test_every_raw_result_that_is_named_exists() -> None:
    named = {name for cells in ROWS for name in cells[-1].split(", ") if name.endswith(".json")}
    folder = ROOT / "scripts" / "results"
    assert named
    paths = [folder / ("" if "/" in name else "epyc") / name for name in named]
    assert [path for path in paths if not path.exists()] == []


def test_the_readme_has_the_same_numbers() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = {
        number.rpartition(" (")[2].rstrip(")"): values
        for number, *values in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in readme.splitlines()
            if line.startswith("| ") and line.count("|") == 4
        )
    }
    assert rows["1"] == ["16", row("bits per weight").split(" | ")[0]]
    assert all(value in row("models/tiny in memory") for value in rows["2"])
    assert (
        rows["6"][1]
        == f"{COMPRESS['compress']['mb_per_cpu_s']:.0f}; {COMPRESS['compress']['peak_mib']}"
    )


H200 = "nvidia-h200"
SERVED = raw(f"{H200}/serve-2026-11-27/serve.json")["variants"]


def step(variant: str, batch: int) -> str:
    points = SERVED[variant]["points"]
    (ms,) = (p["ms"] for p in points if (p["kind"], p.get("batch")) == ("decode", batch))
    return rounded(ms)


def served(variants: list[str], *batches: int) -> str:
    return " | ".join("; ".join(step(variant, batch) for batch in batches) for variant in variants)


def decoded(shape: str) -> str:
    rows = raw(f"{H200}/verdict-2026-11-27/times1.json")["rows"]
    (found,) = (
        r for r in rows if (r["section"], r["case"], r["name"]) == ("decode", shape, "decode")
    )
    return f"{found['us']:.1f} ({2 * prod(map(int, shape.split(' x '))) / found['us'] / 1000:,.0f})"


def test_the_numbers_of_the_h200_are_those_of_its_raw_results() -> None:
    variants = ["bf16", "exact", "fast_exact"]
    tables = (ROOT / "docs" / "benchmarks.md").read_text()
    h200, _, _ = tables.partition("## vLLM on one H100")
    kv = " | ".join(f"{SERVED[variant]['kv_cache_tokens']:,}" for variant in variants)
    held = " | ".join(f"{SERVED[v]['memory']['resident_bytes'] / 2**30:.2f}" for v in variants)
    shapes = ["4096 x 4096", "14336 x 4096", "28672 x 4096", "128256 x 4096"]
    for cells in (
        kv,
        held,
        served(variants, 1, 4, 16),
        served(variants[:2], 64, 256),
        " | ".join(decoded(shape) for shape in shapes),
    ):
        assert f"| {cells} |" in h200
    readme = (ROOT / "README.md").read_text()
    steps = " | ".join(", ".join(step(v, batch) for batch in (1, 64, 256)) for v in variants[:2])
    assert f"| {steps} |" in readme
    assert f"| {' | '.join(kv.split(' | ')[:2])} |" in readme
