"""Measure `vllm-dfloat compress` and `decompress` end to end: MB/s of BF16 and peak memory.

    python scripts/bench_compress.py [--gigabytes 2.4] [--units 1] [--workers 1] [--threads 1] [--json FILE]

Makes a checkpoint of random weights N(0, 0.02) in a temporary folder (or in `--folder`), runs the real commands in
their own processes, and removes everything. `compress` reads, encodes, writes, hashes, decodes its output and compares;
the output of `decompress` is compared before anything is reported. CPU seconds are user and system time of all
processes of a command, including their start, so the number per core-second is valid on a busy machine too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench.results import processor, write_json

from vllm_dfloat.storage.safetensors_write import Item, write_safetensors

MEMBERS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
COLUMNS = 4096
ROWS_AT_ONCE = 1024


def random_rows(rows: int, seed: int) -> Iterator[np.ndarray]:
    """Yield BF16 bits of N(0, 0.02), truncated, not rounded."""
    rng = np.random.default_rng(seed)
    for first in range(0, rows, ROWS_AT_ONCE):
        shape = (min(ROWS_AT_ONCE, rows - first), COLUMNS)
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        yield (values.view(np.uint32) >> 16).astype(np.uint16)


def make_checkpoint(folder: Path, num_bytes: int, units: int) -> None:
    """Write a model of `units` transformer blocks with about `num_bytes` bytes in total."""
    folder.mkdir()
    rows = max(1, num_bytes // (2 * COLUMNS * units * len(MEMBERS)))
    names = [f"model.layers.{i}.{member}.weight" for i in range(units) for member in MEMBERS]
    items = [
        Item(name, "BF16", (rows, COLUMNS), lambda seed=seed: random_rows(rows, seed))
        for seed, name in enumerate(names)
    ]
    write_safetensors(folder / "model.safetensors", items)
    (folder / "config.json").write_text("{}\n")


def run(command: list[str], threads: int) -> dict[str, Any]:
    """Run a command to its end; return its wall and CPU seconds and the peak memory of its largest process."""
    environment = {**os.environ, "VLLM_DFLOAT_THREADS": str(threads)}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status:
        sys.exit(f"bench_compress: {' '.join(command)} ended with status {status}")
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": usage.ru_maxrss >> 10,
    }


def rates(num_bytes: int, used: dict[str, Any]) -> dict[str, Any]:
    megabytes = num_bytes / 1e6
    return {
        "mb_per_s": round(megabytes / used["wall_s"], 1),
        "mb_per_cpu_s": round(megabytes / used["cpu_s"], 1),
        **used,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument("--units", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", help="as compress takes it, with no workers then")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-compress-", dir=args.folder))
    try:
        make_checkpoint(folder / "bf16", int(args.gigabytes * 1e9), args.units)
        num_bytes = (folder / "bf16/model.safetensors").stat().st_size
        program = [sys.executable, "-m", "vllm_dfloat.cli"]
        paths = [str(folder / name) for name in ("bf16", "df11", "again")]
        workers = ["--workers", str(args.workers)]
        how = ["--device", args.device] if args.device else workers
        used = run([*program, "compress", *paths[:2], *how], args.threads)
        back = run([*program, "decompress", *paths[1:], *workers], args.threads)
        run([*program, "verify", paths[1], "--against", paths[2]], args.threads)
        written = sum(file.stat().st_size for file in (folder / "df11").glob("*.safetensors"))
    finally:
        shutil.rmtree(folder)
    result = {
        "bf16_bytes": num_bytes,
        "units": args.units,
        "ratio": round(written / num_bytes, 4),
        "workers": args.workers,
        "threads": args.threads,
        "device": args.device or "cpu",
        "compress": rates(num_bytes, used),
        "decompress": rates(num_bytes, back),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result, indent=1))
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
