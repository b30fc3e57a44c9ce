"""The subcommand: vllm-dfloat plan."""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm_dfloat.commands.arguments import path, place
from vllm_dfloat.commands.output import say, say_json
from vllm_dfloat.plan.kv_cache import DTYPE_BYTES
from vllm_dfloat.plan.settings import MODES
from vllm_dfloat.plan.states import STATE_DTYPES

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1
EXAMPLE = (
    "example: vllm-dfloat plan ./Llama-3.1-405B/config.json --gpus 8 --gpu-memory 80GiB. "
    "Exit status: 0 fits in DFloat11, 1 does not, 2 bad input. Without --max-model-len a model fits if one token does; "
    "the longest context is printed."
)


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to the subparsers, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan", help="say whether a model fits, and how long a context, before anything is loaded", epilog=EXAMPLE
    )  # fmt: skip
    parser.add_argument(
        "model", type=place, help="folder of a model, its config.json alone, or a hub id"
    )
    for add_group in (_add_gpus, _add_memory, _add_offload, _add_compression, _add_output):
        add_group(parser)
    parser.set_defaults(run=run)
    return parser


def _add_gpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus", type=int, help="how many GPUs (default: --tp times --pp times --dp)"
    )
    parser.add_argument(
        "--gpu-memory", required=True, metavar="SIZE",
        help="of each GPU, with a unit: 80GiB, or 81920MiB as nvidia-smi shows it; 80GB and 80G are 80 * 10**9 bytes",
    )  # fmt: skip
    parser.add_argument(
        "--tp", type=int, help="ranks of tensor parallelism (default: the GPUs / --pp / --dp)"
    )
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    parser.add_argument(
        "--dp", "--data-parallel-size", type=int, default=1,
        help="engines that share routed experts, and nothing else (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--enable-expert-parallel", "--expert-parallel", action="store_true",
        help="each rank holds whole experts, as with vLLM's option of that name",
    )  # fmt: skip


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Add what says how much lies beside the weights: KV cache, states, batches."""
    parser.add_argument(
        "--max-model-len", type=int, help="tokens of the longest request that must fit"
    )
    parser.add_argument(
        "--kv-cache-dtype", default="auto", help=f"{_either(DTYPE_BYTES)} (default: auto)"
    )
    parser.add_argument(
        "--mamba-ssm-cache-dtype", default="auto", help=f"of states: {_either(STATE_DTYPES)} (default: auto)"
    )  # fmt: skip
    parser.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="with it, models with states hold two per request (default: on, as vLLM's)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, help="default: 0.92, as vLLM's"
    )
    parser.add_argument(
        "--block-size", type=int, help="tokens per KV block (default: vLLM's for such a model)"
    )
    parser.add_argument("--max-num-batched-tokens", type=int, help="default: vLLM's for such a GPU")
    parser.add_argument("--max-num-seqs", type=int, help="default: vLLM's for such a GPU")
    parser.add_argument(
        "--overhead", metavar="SIZE", help="all beside weights and KV cache, such as 3GiB or 0 (default: estimated)"
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache-memory", metavar="SIZE",
        help="fix the KV cache of each rank, such as 10GiB (what vLLM's --kv-cache-memory-bytes calls 10G)",
    )  # fmt: skip


def _either(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"


def _add_offload(parser: argparse.ArgumentParser) -> None:
    """Add what says which weights lie in host memory."""
    parser.add_argument(
        "--cpu-offload-gb", type=float, default=0, metavar="GIB",
        help="GiB per GPU of weights in host memory, compressed ones for DFloat11 (default: 0, as vLLM's)",
    )  # fmt: skip
    parser.add_argument(
        "--offload-group-size", type=int, default=0, metavar="N",
        help="prefetching offload: of every N blocks the last lie in host memory (default: 0, none, as vLLM's)",
    )  # fmt: skip
    parser.add_argument(
        "--offload-num-in-group", type=int, default=1, metavar="N", help="how many of them (default: 1)"
    )  # fmt: skip
    parser.add_argument(
        "--offload-prefetch-step", type=int, default=1, metavar="N",
        help="how many blocks ahead they are copied, each to buffers of its own (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--offload-params", nargs="+", default=[], metavar="SEGMENT",
        help="only parameters with such a segment in vLLM's name, as experts or mlp (default: all)",
    )  # fmt: skip


def _add_compression(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--granularity", choices=("layer", "block"), default="layer", help="what is decoded at a time (default: layer)"
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=("packed", "fast", "dfloat11", "auto", "all"), default="packed",
        help="how compressed weights are held, as the option of that name; all: each of these, beside BF16",
    )  # fmt: skip
    parser.add_argument(
        "--kv-tokens", type=int,
        help="that layout auto leaves room for, with --layout auto or all (default: one request of --max-model-len)",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=MODES, default=MODES[0],
        help=f"of serving, by which layout auto goes, with --layout auto or all (default: {MODES[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--slab", metavar="SIZE", help="of the LM head, as the option `slab`: auto (default), off, bytes, 64MiB"
    )  # fmt: skip
    parser.add_argument(
        "--code-bits", type=float, help="bits per exponent (default: measured, or 2.7 assumed)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--png", type=path, metavar="FILE", help="also draw it; needs matplotlib")
    parser.add_argument("--quiet", action="store_true", help="print the last line only")


def run(args: argparse.Namespace) -> int:
    """Plan, print, draw; return the exit status."""
    from vllm_dfloat.commands.plan_settings import settings_of
    from vllm_dfloat.plan.layout_sizes import AUTO, LAYOUTS
    from vllm_dfloat.plan.plan import make_plan
    from vllm_dfloat.plan.report import as_json, as_table, side_by_side, summary

    settings = settings_of(args)
    plan = make_plan(args.model, settings, args.code_bits)
    if args.png:
        from vllm_dfloat.plan.picture import draw

        draw(plan, args.png)
    if args.layout == "all":
        others = [replace(settings, layout=layout) for layout in (*LAYOUTS[1:], AUTO)]
        plans = [plan, *(make_plan(args.model, one, args.code_bits) for one in others)]
        if args.json:
            say_json({one.settings.layout: as_json(one) for one in plans})
        else:
            say(*([] if args.quiet else side_by_side(plans)), summary(plan, settings.layout))
    elif args.json:
        say_json(as_json(plan))
    else:
        say(*([summary(plan)] if args.quiet else as_table(plan)))
    return EXIT_FITS if plan.dfloat11.fits else EXIT_DOES_NOT_FIT
