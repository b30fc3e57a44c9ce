"""Compile every kernel for every target GPU, without one, and report what the compiler made of it.

    python scripts/kernel_report.py            # a table
    python scripts/kernel_report.py --json     # the same as JSON

Per kernel and target: registers per thread, spilled bytes, shared memory, barriers, and SASS instructions per weight:
instructions a warp would issue if each ran once, times its threads, divided by the weights of a program. For a kernel
without loops (the decode kernel) that is what runs, both branches counted; for one with loops it is the code's size.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import triton

from vllm_dfloat.kernels.compile_spec import TARGETS, CompileSpec

MODULES = (
    "decode",
    "decode_block",
    "decode_dfloat11",
    "encode",
    "matmul_gemv",
    "matmul_dot",
    "matmul",
)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE
)
RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


def specs() -> list[CompileSpec]:
    modules = (import_module(f"vllm_dfloat.kernels.{name}") for name in MODULES)
    return [spec for module in modules for spec in module.COMPILE_SPECS]


def dump(option: str, cubin: Path) -> str:
    return subprocess.run([TOOL, option, cubin], check=True, capture_output=True, text=True).stdout


def measure(spec: CompileSpec, capability: int) -> dict[str, Any]:
    """Return one row of the report."""
    compiled = spec.compile(capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        resources = dict(RESOURCE.findall(dump("--dump-resource-usage", cubin)))
        names = INSTRUCTION.findall(dump("-sass", cubin))
    kinds = Counter(
        name.split(".")[0] for name in names if name != "NOP"
    )  # NOPs fill up the last line
    threads = 32 * spec.num_warps
    return {
        "kernel": spec.name,
        "target": f"sm_{capability}",
        "registers": int(resources["REG"]),
        "spilled_bytes": int(resources["STACK"]) + int(resources["LOCAL"]),
        "shared_bytes": int(compiled.metadata.shared),
        "barriers": kinds["BAR"],
        "instructions": kinds.total(),
        "instructions_per_weight": round(kinds.total() * threads / spec.weights_per_program, 2),
        "widest_store_bits": max(
            [int(n) for n in re.findall(r"STG\.E\.(\d+)", "\n".join(names))] + [32]
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="default: all")
    args = parser.parse_args()
    rows = [measure(spec, target) for spec in specs() for target in args.target or TARGETS]
    if args.json:
        json.dump({"triton": triton.__version__, "kernels": rows}, sys.stdout, indent=1)
        return 0
    heads = list(rows[0])
    widths = [max(len(head), *(len(str(row[head])) for row in rows)) for head in heads]
    for line in [heads, *([str(row[head]) for head in heads] for row in rows)]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
