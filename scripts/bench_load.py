"""Time to load a model: BF16 vLLM, compressed while loading, and from an official checkpoint, side by side.

    python scripts/bench_load.py [--shape llama-3.2-1b | --model PATH] [--runs 3] [--tp 1] [--json FILE]

Every load is vLLM's own loader in its own process (bench/load/rank.py), in rounds of all variants; prints medians.
"cold": the files are not in the page cache at the start; "warm": they are. Both compressed variants must hold the same
bytes after loading, or no time is printed and the exit status is 1. A random model is written to a temporary folder, or
to `--folder`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.load.models import load_rank, write_model
from bench.results import write_json
from bench.serve.model import SHAPES, BenchError

GIB = 1 << 30
VARIANTS = {  # name -> (which checkpoint, options)
    "BF16 vLLM": ("bf16", []),
    "compressed while loading": ("bf16", ["--quantization", "dfloat11"]),
    "official checkpoint": ("official", ["--quantization", "dfloat11"]),
}


def checkpoints(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Return the BF16 model and its compressed form; make them if they do not exist."""
    original = args.model or folder / "bf16"
    if not args.model:
        write_model(args.shape, SHAPES[args.shape]["num_hidden_layers"], original)
    compressed = folder / "dfloat11"
    if not (compressed / "dfloat11_manifest.json").exists():
        tool = [sys.executable, "-m", "vllm_dfloat.cli", "compress", str(original), str(compressed)]
        subprocess.run(tool, check=True)
    return {"bf16": original, "official": compressed}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load every variant `args.runs` times, alternating cold and warm; return all times in seconds."""
    paths = checkpoints(args, folder)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"cold": [], "warm": []} for name in VARIANTS
    }
    last: dict[str, dict[str, Any]] = {}
    for _ in range(args.runs):
        for name, (kind, options) in VARIANTS.items():
            for cache in ("cold", "warm"):
                found = load_rank(paths[kind], *options, "--tp", str(args.tp), cold=cache == "cold")
                seconds[name][cache].append(found["seconds"])
                last[name] = found
                print(f"{name}, {cache}: {found['seconds']:.2f} s", file=sys.stderr, flush=True)
    sums = [last[name]["checksums"] for name in list(VARIANTS)[1:]]
    return {
        "model": str(args.model.name if args.model else args.shape),
        "tp": args.tp,
        "device": last["BF16 vLLM"]["device"],
        "bf16_bytes": last["BF16 vLLM"]["bf16_bytes"],
        "seconds": seconds,
        "peak_bytes": {name: found["peak_bytes"] for name, found in last.items()},
        "same_bytes": sums[0] == sums[1] != 0,
    }


def table(result: dict[str, Any]) -> str:
    """Return the medians, and their ratios to BF16 vLLM."""
    base = {
        cache: statistics.median(result["seconds"]["BF16 vLLM"][cache])
        for cache in ("cold", "warm")
    }
    lines = [f"{'':<26}{'cold s':>9}{'x BF16':>8}{'warm s':>9}{'x BF16':>8}{'peak GiB':>10}"]
    for name, runs in result["seconds"].items():
        cells = ""
        for cache in ("cold", "warm"):
            median = statistics.median(runs[cache])
            cells += f"{median:>9.2f}{median / base[cache]:>8.2f}"
        lines.append(f"{name:<26}{cells}{result['peak_bytes'][name] / GIB:>10.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument(
        "--model", type=Path, help="folder of a BF16 model, instead of random weights"
    )
    parser.add_argument("--tp", type=int, default=1, help="load rank 0 of that many (default: 1)")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoints")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-load-") as temporary:
            result = measure(args, args.folder or Path(temporary))
    except BenchError as trouble:
        print(trouble, file=sys.stderr)
        return 2
    write_json(args.json, result)
    if not result["same_bytes"]:
        print(
            "the two compressed variants hold different bytes: no time is reported", file=sys.stderr
        )
        return 1
    print(
        f"{result['model']}, {result['bf16_bytes'] / GIB:.3f} GiB of BF16, TP {result['tp']}, {result['device']}"
    )
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
