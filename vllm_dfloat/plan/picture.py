"""A plan as a PNG: what fills each GPU, in BF16 and in DFloat11."""

from pathlib import Path
from typing import Any

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.memory import GIB
from vllm_dfloat.plan.plan import Plan
from vllm_dfloat.plan.report import summary

COLOURS = {"weights": "#4477aa", "scratch": "#ccbb44", "other": "#bbbbbb", "KV cache": "#228833"}

ROOM_FOR_LABELS = 1.25


def draw(plan: Plan, file: Path) -> None:
    """Write the picture: two bars per pipeline stage, and lines at the GPU's memory and at what vLLM may use.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    figure_class, canvas_class = _matplotlib()
    bars = _bars(plan)
    figure = figure_class(figsize=(9, 1.6 + 0.5 * len(bars)), dpi=120, layout="constrained")
    canvas_class(figure)
    axes = figure.add_subplot()
    right = 0.0
    for at, (label, parts) in enumerate(bars):
        left = 0.0
        for name, num_bytes in parts.items():
            width = max(0, num_bytes) / GIB
            axes.barh(at, width, left=left, color=COLOURS[name], label=name if at == 0 else None)
            left += width
        beside = max(left, plan.settings.gpu_memory / GIB)
        axes.text(beside, at, f" {label}", va="center", fontsize=8)
        right = max(right, beside)
    for memory, style in ((plan.settings.gpu_memory, "-"), (plan.settings.requested, "--")):
        axes.axvline(memory / GIB, color="#ee6677", linestyle=style)
    axes.set_yticks(range(len(bars)), [_row_name(plan, i) for i in range(len(bars))])
    axes.invert_yaxis()
    axes.set_xlim(0, ROOM_FOR_LABELS * right)
    axes.set_xlabel("GiB per GPU; line: its memory, dashed: what vLLM may use")
    axes.set_title(summary(plan), fontsize=9, wrap=True)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(COLOURS),
        fontsize=8,
    )
    figure.savefig(file, format="png")


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"--png: matplotlib is not installed ({error}); the picture needs it. "
            "Install the extra: pip install 'vllm-dfloat[bench]'."
        ) from error
    return Figure, FigureCanvasAgg


def _bars(plan: Plan) -> list[tuple[str, dict[str, int]]]:
    """Return what to write behind each bar, and its parts in bytes."""
    bars = []
    for index, rank in enumerate(plan.ranks):
        for outcome, weights, scratch in (
            (plan.bf16, rank.bf16_weights, 0),
            (plan.dfloat11, rank.dfloat11_weights, rank.scratch),
        ):
            parts = dict(
                zip(
                    COLOURS, (weights, scratch, rank.overhead, outcome.kv_bytes[index]), strict=True
                )
            )
            label = f"{outcome.tokens:,} KV tokens" if outcome.fits else "does not fit"
            bars.append((label, parts))
    return bars


def _row_name(plan: Plan, index: int) -> str:
    kind = "DFloat11" if index % 2 else "BF16"
    return f"stage {index // 2}, {kind}" if plan.settings.pp > 1 else kind
