"""A plan in words, and as JSON."""

from collections.abc import Sequence
from typing import Any

from vllm_dfloat.plan.byte_sizes import show_count, show_size
from vllm_dfloat.plan.memory import Rank
from vllm_dfloat.plan.outcome import Outcome
from vllm_dfloat.plan.plan import Plan

NAME, CELL = 24, 14
DASH = "-"


def as_table(plan: Plan) -> list[str]:
    """Return the plan as lines: a table per pipeline stage, then what fits, then one sentence."""
    settings, config = plan.settings, plan.config
    lines = [
        f"{plan.model}: {config.architecture}, {show_count(plan.parameters)} parameters "
        f"in bfloat16",
        f"{settings.ranks}, each GPU {show_size(settings.gpu_memory)}, vLLM may use "
        f"{settings.gpu_memory_utilization:g} of it: {show_size(settings.requested)}",
    ]
    for index, rank in enumerate(plan.ranks):
        lines += ["", *_stage(plan, index, rank)]
    who = "all ranks" if settings.dp == 1 else f"each of {settings.dp} engines"
    lines += ["", _row(who, "BF16", "DFloat11"), *_capacity(plan), ""]
    lines += [f"{note}." for note in (*plan.notes, f"codes: {plan.code_bits}")]
    lines += [f"other: {_other(plan)}.", "", summary(plan)]
    return [line.rstrip() for line in lines]


def side_by_side(plans: Sequence[Plan]) -> list[str]:
    """Return a table, as lines, of a model's plans in different layouts, beside BF16; of the stage with most weights.

    Below it, what the first plan is based on, and what "auto" chose.
    """
    first = max(plans[0].ranks, key=lambda rank: rank.bf16_weights)
    lines = [
        _cells("layout", "weights", "bits", "scratch", "for KV", "KV tokens"),
        _cells("BF16", show_size(first.bf16_weights), "16", DASH, *_room(plans[0].bf16)),
    ]
    for plan in plans:
        rank = max(plan.ranks, key=lambda rank: rank.dfloat11_weights)
        sizes = show_size(rank.dfloat11_weights), f"{rank.bits_per_weight:.2f}"
        room = _room(plan.dfloat11)
        lines.append(_cells(plan.settings.layout, *sizes, show_size(rank.scratch), *room))
    choice = [f"{sentence}." for plan in plans for sentence in plan.choice]
    return [*lines, "", f"codes: {plans[0].code_bits}.", *choice]


def _room(outcome: Outcome) -> tuple[str, str]:
    tokens = f"{outcome.tokens:,}" if outcome.fits else "does not load"
    return show_size(min(outcome.kv_bytes)), tokens


def _cells(name: str, *cells: str) -> str:
    return f"{name:<10}" + "".join(f"{cell:>{CELL}}" for cell in cells)


def summary(plan: Plan, layout: str = "") -> str:
    """Return the last line: what fits; with the layout, if it was planned for several."""
    of_layout = f", layout {layout}" if layout else ""
    return f"{plan.model}{of_layout}: {verdict(plan)}."


def verdict(plan: Plan) -> str:
    """Return what fits, in a few words."""
    asked = plan.settings.max_model_len
    what = f"a context of {asked:,} tokens" if asked else "the model"
    if not (plan.bf16.fits or plan.dfloat11.fits):
        return f"{what} fits neither in BF16 nor in DFloat11"
    if plan.bf16.fits and plan.dfloat11.fits and plan.bf16.tokens:
        more = plan.dfloat11.tokens / plan.bf16.tokens
        return f"{what} fits in both; DFloat11 has room for {more:.2f} times the KV tokens"
    return f"{what} fits in {'DFloat11' if plan.dfloat11.fits else 'BF16'} only"


def _row(name: str, bf16: str, dfloat11: str, remark: str = "") -> str:
    return f"{name:<{NAME}}{bf16:>{CELL}}{dfloat11:>{CELL}}  {remark}"


def _stage(plan: Plan, index: int, rank: Rank) -> list[str]:
    tp = plan.settings.tp
    first = rank.stage * tp
    who = f"rank {first}" if tp == 1 else f"each of ranks {first}-{first + tp - 1}"
    layers = f"layers {rank.layers.start}-{rank.layers.stop - 1}"
    per_token = f"{plan.kv_bytes_per_token(rank):,.0f}"
    largest = "largest block" if plan.settings.granularity == "block" else "largest layer"
    largest += ", or a slab of the LM head" if rank.whole_head else ""
    towers = []
    if rank.bf16_towers:
        sizes = show_size(rank.bf16_towers), show_size(rank.dfloat11_towers)
        towers = [_row("  of which the tower", *sizes, "with its projector")]
    on_host = []
    prefetches = bool(plan.settings.prefetch.group_size)
    if plan.settings.cpu_offload or prefetches:
        sizes = show_size(rank.bf16_host), show_size(rank.dfloat11_host)
        option = "--offload-group-size" if prefetches else "--cpu-offload-gb"
        on_host = [_row("  in host memory", *sizes, option)]
    if prefetches:
        sizes = show_size(rank.bf16_buffers), show_size(rank.dfloat11_buffers)
        on_host.append(_row("buffers", *sizes, "into which they are copied ahead of use"))
    on_top = "two layers" if rank.dfloat11_buffers <= 2 * rank.largest else "the buffers"
    return [
        _row(who, "BF16", "DFloat11", layers),
        _row(
            "weights", show_size(rank.bf16_weights), show_size(rank.dfloat11_weights),
            f"{rank.bits_per_weight:.2f} bits per compressed weight{_layout(plan)}",
        ),
        *towers,
        *on_host,
        _row("scratch", DASH, show_size(rank.scratch), largest),
        _row("other", show_size(rank.overhead), show_size(rank.unproven_overhead)),
        _row(
            "left for the KV cache",
            show_size(plan.bf16.kv_bytes[index]),
            show_size(plan.dfloat11.kv_bytes[index]),
        ),
        _row("peak while loading", DASH, show_size(rank.loading_peak), f"bound: {on_top} on top"),
        _row("KV bytes per token", per_token, per_token),
    ]  # fmt: skip


def _layout(plan: Plan) -> str:
    return "" if plan.settings.layout == "packed" else f", layout {plan.settings.layout}"


def _capacity(plan: Plan) -> list[str]:
    one, other = plan.bf16, plan.dfloat11
    asked = plan.settings.max_model_len
    room = f"{asked:,} tokens" if asked else "1 token"
    loads = {True: "yes", False: "no"}
    return [
        _row("KV tokens", f"{one.tokens:,}", f"{other.tokens:,}"),
        _row(
            "longest context",
            f"{one.longest:,}",
            f"{other.longest:,}",
            f"model's: {plan.config.context:,}",
        ),
        _row("loads", loads[one.fits], loads[other.fits], f"with room for {room}"),
    ]


def _other(plan: Plan) -> str:
    if plan.settings.overhead is not None:
        return "CUDA context, NCCL, CUDA graphs and activations, as given"
    return (
        "CUDA context, NCCL and CUDA graphs 1 GiB, rotary tables, activations of "
        f"{plan.settings.batched_tokens:,} tokens or logits of {plan.settings.num_seqs:,} requests; "
        "assumed, not measured (--overhead)"
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON object; sizes in bytes."""
    settings = plan.settings
    return {
        "model": plan.model,
        "architecture": plan.config.architecture,
        "dtype": "bfloat16",
        "config_dtype": plan.config.dtype,
        "parameters": plan.parameters,
        "compressed_parameters": plan.compressed,
        "tp": settings.tp,
        "pp": settings.pp,
        "dp": settings.dp,
        "enable_expert_parallel": settings.expert_parallel,
        "gpu_memory": settings.gpu_memory,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "requested": settings.requested,
        "cpu_offload": settings.cpu_offload,
        "offload_group_size": settings.prefetch.group_size,
        "offload_num_in_group": settings.prefetch.num_in_group,
        "offload_prefetch_step": settings.prefetch.step,
        "offload_params": sorted(settings.prefetch.params),
        "kv_cache_dtype": settings.kv_cache_dtype,
        "layout": settings.layout,
        "max_model_len": settings.max_model_len,
        "context": plan.config.context,
        "code_bits": plan.code_bits,
        "notes": list(plan.notes),
        "stages": [_stage_json(plan, index, rank) for index, rank in enumerate(plan.ranks)],
        "bf16": _outcome_json(plan.bf16),
        "dfloat11": _outcome_json(plan.dfloat11),
        "dfloat11_if_slabs_are_proven": _outcome_json(plan.proven),
    }


def _stage_json(plan: Plan, index: int, rank: Rank) -> dict[str, Any]:
    return {
        "stage": rank.stage,
        "layers": [rank.layers.start, rank.layers.stop],
        "bf16_weights": rank.bf16_weights,
        "dfloat11_weights": rank.dfloat11_weights,
        "bf16_towers": rank.bf16_towers,
        "dfloat11_towers": rank.dfloat11_towers,
        "bf16_host": rank.bf16_host,
        "dfloat11_host": rank.dfloat11_host,
        "bf16_buffers": rank.bf16_buffers,
        "dfloat11_buffers": rank.dfloat11_buffers,
        "bits_per_weight": rank.bits_per_weight,
        "scratch": rank.scratch,
        "overhead": rank.overhead,
        "whole_head": rank.whole_head,
        "dfloat11_overhead": rank.unproven_overhead,
        "loading_peak": rank.loading_peak,
        "kv_bytes_per_token": plan.kv_bytes_per_token(rank),
        "bf16_kv_bytes": plan.bf16.kv_bytes[index],
        "dfloat11_kv_bytes": plan.dfloat11.kv_bytes[index],
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "num_blocks": outcome.num_blocks,
        "kv_tokens": outcome.tokens,
        "longest_context": outcome.longest,
        "loads": outcome.fits,
    }
