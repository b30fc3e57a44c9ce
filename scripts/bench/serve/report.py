"""The report of the serving benchmark: made from the results of all engines, written as JSON, a table and plots."""

import json
import re
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.serve.options import VARIANTS
from bench.serve.plot import plot
from bench.serve.values import count_runs, memory_unit, point_name, point_of

RESULTS = Path(__file__).parents[2] / "results"
METHOD = (
    "One LLM per process, the engine stepped in that process, the same random prompts for all, greedy, no prefix "
    "caching. Decode: wall time of a step in which every sequence of the batch gets one token, after a warm-up. "
    "Prefill: one prompt until its first token. Capacity: decode steps of the largest batch whose sequences of `hold` "
    "tokens fit the KV cache (at most max_seqs). ms: median of all samples of all runs; low and high: 10th and 90th "
    "percentile."
)

Json = dict[str, Any]


def assemble(head: Json, results: Json, skipped: dict[str, str]) -> Json:
    """Return the report: `head`, the device, the comparison of tokens, and per variant every point over all runs."""
    first = results["bf16"][0]
    gpu = first["device"]["gpu"]
    return {
        **head,
        "method": METHOD,
        "device": {**first["device"], "name": gpu or head["machine"]["processor"]},
        "is_rehearsal": gpu is None,
        "variants": {
            name: variant(name, runs, first["answers"], skipped.get(name))
            for name, runs in results.items()
        },
    }


def variant(name: str, runs: list[Json], expected: list[Json], skipped: str | None) -> Json:
    """Return the results of one variant's runs; "not_run" if no run has answered the prompts."""
    label = VARIANTS[name][0]
    good = [run for run in runs if "answers" in run]
    if not good:
        reason = skipped or (runs[-1].get("error") if runs else None) or "not reached"
        return {"label": label, "not_run": reason}
    kept = ("memory", "kv_cache_tokens", "block_size", "engine")
    trouble = [text for run in runs for key in ("error", "ended") if (text := run.get(key))]
    return {
        "label": label,
        **{key: good[0][key] for key in kept},
        **{key: good[0][key] for key in ("choice",) if key in good[0]},
        "equal_to_bf16": equality(good[0]["answers"], expected),
        "start_seconds": [run["start_seconds"] for run in good],
        "trouble": trouble,
        "points": merge([run["points"] for run in good]),
    }


def equality(answers: list[Json], expected: list[Json]) -> Json:
    """Return how many of the compared tokens and logprobs are exactly equal to those of BF16."""
    counts: Json = {"of": sum(len(answer["tokens"]) for answer in expected)}
    for key in ("tokens", "logprobs"):
        pairs = zip(answers, expected, strict=True)
        counts[key] = sum(x == y for a, b in pairs for x, y in zip(a[key], b[key], strict=True))
    return counts


def merge(runs: list[list[Json]]) -> list[Json]:
    """Return each point once, with the samples of all runs; with a reason only if no run has measured it."""
    merged: dict[str, list[Json]] = {}
    for points in runs:
        for point in points:
            merged.setdefault(point_name(point), []).append(point)
    return [summary([p for p in found if "ms" in p] or found[:1]) for found in merged.values()]


def summary(found: list[Json]) -> Json:
    """Return the statistics of one point's runs."""
    if "not_run" in found[0]:
        return found[0]
    samples = sorted(value for point in found for value in point["ms"])
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if samples[1:] else samples
    median = statistics.median(samples)
    described = {key: value for key, value in found[0].items() if key != "ms"}
    if "batch" in described:
        described["batch"] = min(point["batch"] for point in found)
        described["tokens_per_s"] = round(1000 * described["batch"] / median, 1)
    return {
        **described,
        "ms": median,
        "low": round(tenths[0], 4),
        "high": round(tenths[-1], 4),
        "median_by_run": [statistics.median(point["ms"]) for point in found],
        "samples_by_run": [point["ms"] for point in found],
    }


def progress(result: Json) -> str:
    """Return one line about an engine that has just ended, without times: the comparison may still be missing."""
    if "answers" not in result:
        return f"not run: {result.get('error')}"
    measured = sum("ms" in point for point in result["points"])
    return f"KV cache {result['kv_cache_tokens']:,} tokens; {measured} points measured"


def default_output(gpu: str, date: str) -> Path:
    """Return the first free scripts/results/<gpu>/serve-<date>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
    for number in range(1, 1000):
        suffix = "" if number == 1 else f"-{number}"
        path = RESULTS / slug / f"serve-{date[:10]}{suffix}.json"
        if not path.exists():
            break
    return path


def store(whole: Json, output: Path | None, say: Callable[[str], None] | None = None) -> None:
    """Write the report as JSON and, at the end (with `say`), as plots; nothing without `output`."""
    if output is None:
        if say:
            say("not written: a rehearsal on a CPU; --output FILE.json writes it all the same")
        return
    partial = output.with_suffix(".json.partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    partial.replace(output)
    if say is None:
        return
    say(f"written: {output}")
    if find_spec("matplotlib") is None:
        say(
            "no plots: matplotlib is not installed (pip install '.[bench]'); later: "
            f"python scripts/bench_serve_plot.py {output}"
        )
        return
    plot(whole, output.with_suffix(".png"))
    say(f"written: {output.with_suffix('.png')}")


def table(whole: Json) -> str:
    """Return the report as text: one column per variant, then what was chosen, and the reasons for missing values."""
    variants = whole["variants"]
    rows = [["", *(v["label"] for v in variants.values())]]
    for title, cell in lines(variants):
        rows.append([title, *(cell(v) if "not_run" not in v else "-" for v in variants.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [title_of(whole), ""]
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        text.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    gaps = [f"{v['label']}: {v['choice']}" for v in variants.values() if "choice" in v]
    gaps += [f"not run: {gap}" for v in variants.values() for gap in gaps_of(v)]
    return "\n".join([*text, *([""] if gaps else []), *gaps])


def title_of(whole: Json) -> str:
    """Return model, machine and settings in two or three lines."""
    machine, settings = whole["machine"], whole["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    text = [
        f"{whole['model']} ({whole['weights']}) on {whole['device']['name']}, driver {machine['driver']}, {versions}",
        f"{settings['mode']}; {count_runs(whole)}; {whole['date']}; median (10th to 90th percentile)",
    ]
    if whole["is_rehearsal"]:
        text.insert(0, "REHEARSAL ON A CPU: these times say nothing about a GPU.")
    return "\n".join(text)


def lines(variants: Json) -> list[tuple[str, Callable[[Json], str]]]:
    """Return the rows of the table: a title, and a function from a variant to its cell."""
    unit, size = memory_unit(variants)
    rows: list[tuple[str, Callable[[Json], str]]] = [
        ("tokens equal to BF16's", lambda v: "{tokens} of {of}".format(**v["equal_to_bf16"])),
        ("logprobs equal to BF16's", lambda v: "{logprobs} of {of}".format(**v["equal_to_bf16"])),
        (f"weights on the device, {unit}", lambda v: f"{v['memory']['resident_bytes'] / size:.2f}"),
        ("KV cache, tokens", lambda v: f"{v['kv_cache_tokens']:,}"),
        ("start of the engine, s", lambda v: f"{statistics.median(v['start_seconds']):.0f}"),
    ]
    names = dict.fromkeys(point_name(p) for v in variants.values() for p in v.get("points", []))
    for name in names:
        rows.append((title_of_point(name), lambda v, n=name: time_cell(point_of(v, n))))
    rows.append(("largest batch, sequences", lambda v: cell_of(v, "batch")))
    rows.append(("largest batch, tokens/s", lambda v: cell_of(v, "tokens_per_s")))
    return rows


def title_of_point(name: str) -> str:
    if name.startswith("decode"):
        return f"decode step, batch {name.split()[1]}, ms"
    return "prefill, ms" if name == "prefill" else "largest batch, decode step, ms"


def time_cell(point: Json) -> str:
    if "ms" not in point:
        return "-"
    digits = 2 if point["ms"] < 100 else 0
    return f"{point['ms']:.{digits}f} ({point['low']:.{digits}f} to {point['high']:.{digits}f})"


def cell_of(variant: Json, key: str) -> str:
    value = point_of(variant, "capacity").get(key)
    return "-" if value is None else f"{value:,.0f}"


def gaps_of(variant: Json) -> list[str]:
    """Return the reasons why a variant, or some of its points, have no times."""
    label = variant["label"]
    if "not_run" in variant:
        return [f"{label}: {variant['not_run']}"]
    gaps = [
        f"{label}, {point_name(point)}: {point['not_run']}"
        for point in variant["points"]
        if "not_run" in point
    ]
    return gaps + [f"{label}, from there on: {text}" for text in variant["trouble"]]
