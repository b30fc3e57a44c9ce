"""A plan as a PNG: the memory of each GPU in BF16 and in DFloat11, with numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.errors import UnsupportedError, one_line
from vllm_dfloat.plan.byte_sizes import GIB, MIB, show_size
from vllm_dfloat.plan.plan import Plan
from vllm_dfloat.plan.report import verdict

COLOURS = {
    "weights": "#4477aa", "scratch": "#ccbb44", "other": "#bbbbbb", "KV cache": "#228833", "free": "#f4f4f4",
}  # fmt: skip
MISSING = "#ee6677"
DARK = ("weights", "KV cache")  # which take white numbers
LETTER, MARGIN = (
    0.0085,
    0.012,
)  # of a number, as shares of the axis: a part that is narrower has its number below
HEIGHT, GAP = 0.5, 0.04  # of a bar, and between it and what is written above or below
NAME_LENGTH = 60
SIZE = 8  # of all letters but the title's


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: the label on its left.
        parts: name -> bytes, from the left.
        missing: bytes that are more than there are; 0 if it fits.
    """

    name: str
    parts: dict[str, int]
    missing: int


def draw(plan: Plan, file: Path) -> None:
    """Write the picture: two bars per pipeline stage, and lines at the GPU's memory and at vLLM's share of it.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    figure_class, canvas_class = _matplotlib()
    bars = _bars(plan)
    figure = figure_class(figsize=(9, 1.9 + 0.65 * len(bars)), dpi=120, layout="constrained")
    canvas_class(figure)
    axes = figure.add_subplot()
    longest = max([plan.settings.gpu_memory, *(sum(bar.parts.values()) for bar in bars)])
    unit, name = (GIB, "GiB") if longest >= GIB else (MIB, "MiB")
    axes.set_xlim(0, 1.01 * longest / unit)
    for at, bar in enumerate(bars):
        _draw_bar(axes, at, bar, unit, longest)
    lines = ((plan.settings.gpu_memory, "-", "GPU"), (plan.settings.requested, "--", "vLLM may use"))  # fmt: skip
    for memory, style, what in lines:
        label = f"{what}: {show_size(memory)}"
        axes.axvline(memory / unit, color="#222222", linestyle=style, linewidth=1.2, label=label)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=SIZE)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=SIZE)
    axes.set_xlabel(f"{name} per GPU", fontsize=SIZE)
    axes.set_title(_title(plan), fontsize=9)
    handles = dict(
        zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )  # one of each name
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=SIZE)  # fmt: skip
    figure.savefig(file, format="png")


def _draw_bar(axes: Any, at: int, bar: Bar, unit: int, longest: int) -> None:
    left, narrow = 0, []
    for part, num_bytes in bar.parts.items():
        if num_bytes <= 0:
            continue
        style = dict(height=HEIGHT, edgecolor="white", linewidth=0.5)
        axes.barh(at, num_bytes / unit, left=left / unit, color=COLOURS[part], label=part, **style)
        text = f"free {_number(num_bytes, unit)}" if part == "free" else _number(num_bytes, unit)
        if num_bytes >= (LETTER * len(text) + MARGIN) * longest:
            box = dict(facecolor=COLOURS[part], edgecolor="none", pad=1)  # over the lines
            style = dict(bbox=box, color="white" if part in DARK else "black", fontsize=SIZE)
            axes.text((left + num_bytes / 2) / unit, at, text, ha="center", va="center", **style)
        else:
            narrow.append((left, f"{part} {text}" if part != "free" else text))
        left += num_bytes
    if narrow:
        _write_below(axes, at, narrow, unit, longest)
    if bar.missing:
        style = dict(height=HEIGHT, color="none", edgecolor=MISSING, hatch="///", linewidth=1)
        axes.barh(
            at, bar.missing / unit, left=(left - bar.missing) / unit, label="missing", **style
        )
        text = f"{_number(bar.missing, unit)} missing"
        style = dict(color="#bb3344", ha="right", va="bottom", fontsize=SIZE)
        axes.text(left / unit, at - HEIGHT / 2 - GAP, text, **style)


def _write_below(
    axes: Any, at: int, narrow: list[tuple[int, str]], unit: int, longest: int
) -> None:
    """Write the numbers of narrow parts in one line below the first of them, but within the picture."""
    caption = ", ".join(text for _, text in narrow)
    start = max(0.0, min(narrow[0][0], longest * (1 - LETTER * len(caption))))
    box = dict(facecolor="white", edgecolor="none", pad=0.5)
    style = dict(va="top", fontsize=SIZE - 1, bbox=box)
    axes.text(start / unit, at + HEIGHT / 2 + GAP, caption, **style)


def _number(num_bytes: int, unit: int) -> str:
    """Return a size, without GiB or MiB if that is on the axis."""
    return show_size(num_bytes).removesuffix(" GiB" if unit == GIB else " MiB")


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"--png: matplotlib is not installed ({error}); the picture needs it. "
            "Run: pip install matplotlib."
        ) from error
    return Figure, FigureCanvasAgg


def _bars(plan: Plan) -> list[Bar]:
    settings, bars = plan.settings, []
    limit = settings.gpu_memory if settings.kv_cache_memory else settings.requested
    for index, rank in enumerate(plan.ranks):
        for kind, outcome, weights, scratch, other in (
            ("BF16", plan.bf16, rank.bf16_on_gpu, 0, rank.overhead),
            (
                "DFloat11",
                plan.dfloat11,
                rank.dfloat11_on_gpu,
                rank.scratch,
                rank.unproven_overhead,
            ),
        ):
            parts = {"weights": weights, "scratch": scratch, "other": other}
            parts["KV cache"] = max(0, outcome.kv_bytes[index])
            missing = sum(parts.values()) - limit
            parts["free"] = max(0, -missing)
            lines = [kind, f"{outcome.tokens:,} KV tokens" if outcome.fits else "does not fit"]
            if not outcome.fits and outcome.longest:
                lines[1] = f"context over {outcome.longest:,} tokens"
            host = rank.bf16_host if kind == "BF16" else rank.dfloat11_host
            if settings.cpu_offload or settings.prefetch.group_size:
                lines.append(f"{show_size(host)} in host memory")
            if settings.pp > 1:
                lines[0] = f"stage {rank.stage}, {kind}"
            bars.append(Bar("\n".join(lines), parts, max(0, missing)))
    return bars


def _title(plan: Plan) -> str:
    settings = plan.settings
    name = one_line(plan.model.rstrip("/"), NAME_LENGTH).replace(
        "$", r"\$"
    )  # or it would be mathematics
    gpus = settings.tp * settings.pp * settings.dp
    memory = show_size(settings.gpu_memory)
    what = f"{gpus} GPUs of {memory} each" if gpus > 1 else f"a GPU of {memory}"
    return f"{name}\n{settings.ranks}, {what}: {verdict(plan)}"
