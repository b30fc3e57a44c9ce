"""Measure the memory that a rank needs while loading, on the real shapes of a large model, one rank at a time.

    python scripts/load_scale.py [--shape llama-3.1-405b] [--layers 1] [--tp 8] [--ranks 0,7] [--json FILE]
    python scripts/load_scale.py --shape qwen3-235b-a22b [--enable-expert-parallel]

Writes random weights N(0, 0.02): embedding, LM head and `--layers` transformer blocks (a 405B: 14.8 GB), compresses
them with the real command (10 GB more), and loads each rank from both checkpoints with vLLM's loader, each in its own
process (bench/load/rank.py), from files outside of the page cache. The peak must stay below the sum of the bytes held
after loading, two of the rank's largest layers (the experts of a block are one layer), and the scratch; otherwise the
exit status is 1. The script also prints the total for all layers, and the numbers of `vllm-dfloat plan`. All files are
in a temporary folder, or in `--folder`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.load.models import load_rank, write_model
from bench.results import write_json
from bench.serve.model import SHAPES, BenchError

GIB = 1 << 30


def planned(model: Path, args: argparse.Namespace) -> dict[str, int]:
    """Return the numbers of `vllm-dfloat plan` for a rank, in bytes."""
    from vllm_dfloat.plan.plan import make_plan
    from vllm_dfloat.plan.settings import Settings

    settings = Settings(tp=args.tp, expert_parallel=args.enable_expert_parallel)
    rank = make_plan(str(model), settings).ranks[0]
    return {
        "held_bytes": rank.dfloat11_weights,
        "scratch_bytes": rank.scratch,
        "loading_peak_bytes": rank.loading_peak,
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the checkpoints and load every rank from each; return all results."""
    original, compressed = folder / "bf16", folder / "dfloat11"
    config = write_model(args.shape, args.layers, original)
    if "official" in args.checkpoints and not (compressed / "dfloat11_manifest.json").exists():
        command = [
            sys.executable,
            "-m",
            "vllm_dfloat.cli",
            "compress",
            str(original),
            str(compressed),
        ]
        subprocess.run(command, check=True)
    whole = folder / "whole"
    whole.mkdir(exist_ok=True)
    all_layers = SHAPES[args.shape]["num_hidden_layers"]
    (whole / "config.json").write_text(json.dumps({**config, "num_hidden_layers": all_layers}))
    ranks = []
    for kind in args.checkpoints:
        model = original if kind == "bf16" else compressed
        for rank in args.ranks or range(args.tp):
            options = ["--quantization", "dfloat11", "--tp", str(args.tp), "--rank", str(rank)]
            options += ["--enable-expert-parallel"] * args.enable_expert_parallel
            found = load_rank(model, *options)
            found["bound_bytes"] = (
                found["held_bytes"] + 2 * found["largest_layer_bytes"] + found["scratch_bytes"]
            )
            more = (all_layers - args.layers) * found["block_bytes"] // args.layers
            found["extrapolated_held_bytes"] = found["held_bytes"] + more
            found["extrapolated_peak_bytes"] = found["peak_bytes"] + more
            ranks.append({"checkpoint": kind, "rank": rank, **found})
            print(line_of(ranks[-1]), flush=True)
    return {
        "shape": args.shape,
        "layers": args.layers,
        "all_layers": all_layers,
        "tp": args.tp,
        "enable_expert_parallel": args.enable_expert_parallel,
        "ranks": ranks,
        "plan": planned(original, args),
        "plan_of_all_layers": planned(whole, args),
    }


def line_of(rank: dict[str, Any]) -> str:
    """Return a row of the table."""
    sizes = [
        rank[name] / GIB
        for name in (
            "bf16_bytes",
            "held_bytes",
            "peak_bytes",
            "bound_bytes",
            "read_bytes",
            "file_bytes",
        )
    ]
    return (
        f"{rank['checkpoint']:<9}{rank['rank']:>4}{rank['seconds']:>9.1f}"
        + "".join(f"{size:>11.3f}" for size in sizes)
        + ("  ok" if rank["peak_bytes"] <= rank["bound_bytes"] else "  OVER THE BOUND")
    )


def summary_of(result: dict[str, Any]) -> str:
    """Return the total for all layers of the model, and the plan's numbers."""
    worst = max(result["ranks"], key=lambda rank: rank["extrapolated_peak_bytes"])
    plan, whole = result["plan"], result["plan_of_all_layers"]
    rows = [
        (
            f"held, {result['layers']} of {result['all_layers']} layers",
            worst["held_bytes"],
            plan["held_bytes"],
        ),
        (
            f"held, all {result['all_layers']} layers",
            worst["extrapolated_held_bytes"],
            whole["held_bytes"],
        ),
        (
            f"peak, all {result['all_layers']} layers",
            worst["extrapolated_peak_bytes"],
            whole["loading_peak_bytes"],
        ),
    ]
    head = f"{'GiB per rank':<28}{'measured':>12}{'plan':>12}"
    return "\n".join(
        [head, *(f"{name:<28}{a / GIB:>12.3f}{b / GIB:>12.3f}" for name, a, b in rows)]
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-405b")
    parser.add_argument(
        "--layers", type=int, default=1, help="transformer blocks to write (default: 1)"
    )
    parser.add_argument(
        "--tp", type=int, default=8, help="ranks of tensor parallelism (default: 8)"
    )
    parser.add_argument(
        "--enable-expert-parallel", action="store_true", help="ranks hold whole experts, as in vLLM"
    )
    parser.add_argument("--ranks", type=numbers, help="which to load, such as 0,7 (default: all)")
    parser.add_argument(
        "--checkpoints", type=lambda text: text.split(","), default=["bf16", "official"]
    )
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoints")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if unknown := set(args.checkpoints) - {"bf16", "official"}:
        parser.error(
            f"--checkpoints {sorted(unknown)[0]}: expected bf16, official, or both with a comma"
        )
    if args.tp < 1 or not all(0 <= rank < args.tp for rank in args.ranks or ()):
        parser.error(f"--ranks {args.ranks}, --tp {args.tp}: expected ranks from 0 to tp - 1")
    print(
        f"{'from':<9}{'rank':>4}{'seconds':>9}"
        + "".join(
            f"{name:>11}" for name in ("BF16 GiB", "held", "peak", "bound", "read", "of files")
        ),
        flush=True,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="load-scale-") as temporary:
            result = measure(args, args.folder or Path(temporary))
    except BenchError as trouble:
        print(trouble, file=sys.stderr)
        return 2
    print(summary_of(result))
    write_json(args.json, result)
    within = all(rank["peak_bytes"] <= rank["bound_bytes"] for rank in result["ranks"])
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
