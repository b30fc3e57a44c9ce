"""The command line of the serving benchmark: its arguments and their checks."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench.serve.model import SHAPES, BenchError, read_config

COMPRESSED: dict[str, Any] = {"quantization": "dfloat11"}
PREFETCH = {"offload_group_size": 4}
# name -> (label in tables and plots, arguments of vLLM)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("BF16", {}),
    "exact": ("DFloat11 exact", COMPRESSED),
    "fused": (
        "DFloat11 fused",
        {**COMPRESSED, "additional_config": {"dfloat11": {"mode": "fused"}}},
    ),
    "offload": ("BF16 + CPU offload", {}),  # its size is known after the first two ran
    # As many bytes in host memory as DFloat11 saves, known then too; and BF16 in the GPU memory that this takes.
    "exact_offload": ("DFloat11 exact + CPU offload", COMPRESSED),
    "offload_more": ("BF16 + more CPU offload", {}),
    # One layer of four in host memory, copied ahead of use; --engine takes vLLM's other options of this offload.
    "prefetch": ("BF16 + prefetching offload", PREFETCH),
    "exact_prefetch": ("DFloat11 exact + prefetching offload", {**COMPRESSED, **PREFETCH}),
    "official": (
        "DFloat11 official layout",
        {**COMPRESSED, "additional_config": {"dfloat11": {"layout": "dfloat11"}}},
    ),
    "fast_exact": (
        "DFloat11 exact, fast layout",
        {**COMPRESSED, "additional_config": {"dfloat11": {"layout": "fast"}}},
    ),
    "fast_fused": (
        "DFloat11 fused, fast layout",
        {**COMPRESSED, "additional_config": {"dfloat11": {"layout": "fast", "mode": "fused"}}},
    ),
    "fast_fused_exact": (
        "DFloat11 fused where exact, fast layout",
        {
            **COMPRESSED,
            "additional_config": {"dfloat11": {"layout": "fast", "mode": "fused-exact"}},
        },
    ),
    # With as many tokens of KV cache to leave room for as make about half of the matrices fast (half_fast.py).
    "auto": (
        "DFloat11 exact, half fast",
        {**COMPRESSED, "additional_config": {"dfloat11": {"layout": "auto"}}},
    ),
    "block": (
        "DFloat11 exact, by block",
        {**COMPRESSED, "additional_config": {"dfloat11": {"granularity": "block"}}},
    ),
}
DEFAULT_VARIANTS = ("bf16", "exact", "fused", "offload")
COMPARED = ("bf16", "exact")
EXACT = (
    *COMPARED,
    "exact_offload",
    "exact_prefetch",
    "fast_exact",
    "fast_fused_exact",
    "auto",
)  # their tokens must be those of BF16
# BF16 with CPU offload -> the variant whose GPU memory it gets
AS_LARGE_AS = {"offload": "exact", "offload_more": "exact_offload"}
# Set by the variants or by other arguments: in --engine they would make labels and points wrong.
RESERVED = {"model", "quantization", "additional_config", "cpu_offload_gb", "enforce_eager"}
RESERVED |= {"max_num_seqs", "max_model_len", "gpu_memory_utilization", "offload_group_size"}


@dataclass(frozen=True)
class Options:
    """The arguments of one benchmark; `model` is None if random weights of `shape` are written and served."""

    shape: str
    model: Path | None
    folder: Path
    variants: tuple[str, ...]
    variants_given: bool
    batches: tuple[int, ...]
    context: int
    prefill: int
    hold: int
    steps: int
    max_seqs: int
    runs: int
    budget: float
    point_seconds: float
    gpu_memory: float
    eager: bool
    decode_first: bool
    fork: bool
    engine: dict[str, Any]
    output: Path | None
    logs: Path | None
    max_model_len: int
    vocab_size: int


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises BenchError instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{message}. --help lists what can be asked for.")


def parser() -> Parser:
    """Return the parser of the command line."""
    p = Parser(prog="bench_serve.py", description="Measure vLLM with and without DFloat11.")
    add = p.add_argument
    add("--shape", choices=SHAPES, help="random weights of this shape (default llama-3.1-8b)")
    add("--model", type=Path, help="a BF16 checkpoint to serve instead")
    add("--folder", type=Path, help="where random weights lie, or are written to once")
    add("--variants", help=f"of {', '.join(VARIANTS)} (default {','.join(DEFAULT_VARIANTS)})")
    add("--batches", default="1,4,16,64,256", help="batch sizes of the decode steps")
    add("--context", type=int, default=128, help="prompt tokens of a sequence in these batches")
    add("--prefill", type=int, default=8192, help="tokens of the prompt whose prefill is timed")
    add("--hold", type=int, default=2048, help="tokens per sequence at the largest batch that fits")
    add("--steps", type=int, default=100, help="decode steps per point and run, at most")
    add("--max-seqs", type=int, default=512, help="sequences that an engine may run at once")
    add("--runs", type=int, default=2, help="engines started per variant, in alternating order")
    add("--budget", type=float, default=3600, help="seconds for everything")
    add("--point-seconds", type=float, default=15, help="seconds per point and run")
    add("--gpu-memory", type=float, default=0.9, help="vLLM's gpu_memory_utilization, for all")
    add("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    add(
        "--decode-first",
        action="store_true",
        help="decode of every variant (to 64 sequences) before anything else",
    )
    add("--fork", action="store_true", help="import vLLM once: engines are forks of one process")
    add("--engine", default="{}", help="JSON: further arguments of LLM(), for all variants")
    add("--output", type=Path, help="FILE.json; the plots go to FILE.png beside it")
    add("--logs", type=Path, help="FILE.tar.gz that keeps the logs of the engines")
    return p


def parse(argv: list[str] | None) -> Options:
    """Return the options; raise BenchError for options that cannot work."""
    args = parser().parse_args(argv)
    if args.model and (args.shape or args.folder):
        raise BenchError(
            "--model and --shape or --folder: a checkpoint and random weights; expected one of them. Remove the other."
        )
    shape = args.shape or "llama-3.1-8b"
    config = read_config(args.model) if args.model else SHAPES[shape]
    for name in ("context", "prefill", "hold", "steps", "max_seqs", "runs"):
        check(getattr(args, name) >= 1, name, getattr(args, name), "at least 1")
    for name in ("budget", "point_seconds"):
        check(getattr(args, name) > 0, name, getattr(args, name), "more than 0 seconds")
    check(0 < args.gpu_memory <= 1, "gpu_memory", args.gpu_memory, "a share over 0, up to 1")
    if args.logs:
        name = args.logs.name
        check(name.endswith(".tar.gz"), "logs", args.logs, "a name that ends in .tar.gz")
    if args.output:
        check(args.output.suffix == ".json", "output", args.output, "a name that ends in .json")
    values = vars(args) | {
        "shape": args.model.resolve().name if args.model else shape,
        "model": args.model,
        "folder": args.folder or default_folder(shape),
        "variants": variants(args.variants),
        "variants_given": args.variants is not None,
        "batches": batches(args.batches, args.max_seqs),
        "engine": engine(args.engine),
        "vocab_size": config["vocab_size"],
    }
    return Options(**values, max_model_len=longest(args, config["max_position_embeddings"]))


def check(is_good: bool, name: str, value: Any, expected: str) -> None:
    if not is_good:
        raise BenchError(
            f"--{name.replace('_', '-')} {value}: expected {expected}. Correct the argument."
        )


def variants(given: str | None) -> tuple[str, ...]:
    """Return the variants asked for, BF16 first, then exact if it is among them: these two are compared first."""
    names = tuple(dict.fromkeys((given or ",".join(DEFAULT_VARIANTS)).split(",")))
    for name in names:
        if name not in VARIANTS:
            raise BenchError(
                f"--variants: unknown {name!r}; expected some of {', '.join(VARIANTS)}. Correct the name."
            )
    needed = {"bf16"} | ({"exact"} if any("offload" in name for name in names) else set())
    if missing := sorted(needed - set(names)):
        raise BenchError(
            f"--variants {given}: without {missing[0]}; expected {' and '.join(sorted(needed))}, with which the others "
            "are compared. Add it."
        )
    if "offload_more" in names and "exact_offload" not in names[: names.index("offload_more")]:
        raise BenchError(
            f"--variants {given}: offload_more takes the GPU memory of exact_offload; expected that before it. Add it."
        )
    first = tuple(name for name in COMPARED if name in names)
    return first + tuple(name for name in names if name not in first)


def batches(given: str, max_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes in ascending order."""
    try:
        sizes = sorted({int(entry) for entry in given.split(",")})
    except ValueError:
        sizes = [0]
    check(sizes[0] >= 1, "batches", given, "whole numbers from 1, with commas between them")
    check(sizes[-1] <= max_seqs, "batches", given, f"at most {max_seqs} (--max-seqs)")
    return tuple(sizes)


def engine(given: str) -> dict[str, Any]:
    """Return the JSON object of --engine."""
    try:
        value = json.loads(given)
    except ValueError:
        value = None
    check(isinstance(value, dict), "engine", given, 'a JSON object like {"block_size": 32}')
    if taken := sorted(RESERVED & set(value)):
        check(False, "engine", given, f"no {taken[0]}, which a variant or another argument sets")
    return dict(value)


def longest(args: argparse.Namespace, limit: int) -> int:
    """Return the smallest max_model_len for every point; raise BenchError if the model's is shorter."""
    room = (
        2 * args.steps + 64
    )  # for the warm-up, and for tokens of early sequences while late ones are prefilled
    check(
        args.hold > room, "hold", args.hold, f"more than {room}, for {args.steps} steps (--steps)"
    )
    needs = {"prefill": args.prefill + 8, "hold": args.hold, "context": args.context + room}
    name = max(needs, key=needs.__getitem__)
    check(
        needs[name] <= limit,
        name,
        getattr(args, name),
        f"sequences of at most {limit} tokens, the model's max_position_embeddings, not {needs[name]}",
    )
    return needs[name]


def default_folder(shape: str) -> Path:
    """Return the folder in which random weights are kept between benchmarks."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "vllm-dfloat" / shape
