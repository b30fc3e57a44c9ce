"""Compile every kernel for every target GPU, without one, and report what the compiler made of it.

    python scripts/kernel_report.py            # a table
    python scripts/kernel_report.py --json     # the same as JSON

Per kernel and target it reports registers per thread, spilled bytes, shared memory, barriers, SASS instructions, and
executed instructions per weight. For the last, instructions in loops count as often as the loops run, all others once,
on both sides of a branch; the sum is multiplied by the threads of a program and divided by its weights. The same number
is given for each loop alone, in code order: the loop over packed weights, then the one over weights held as BF16. In
the official layout loops run as often as the data requires, so each is counted once: the number is the code size.

Of products with the fast layout, and of its decoders, it also gives what runs where tiles have no escapes and are not
raw: a turn of the loop that multiplies, or a program that decodes (compile_specs/paths.py).

For AMD GPUs (gfx942, gfx950), whose waves have 64 threads, it reports vector registers per thread, bytes spilled to
memory, scalar registers spilled to vector registers, shared memory, and counts of the whole code.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import triton
from compile_specs import decode, encode, fast, fast_matmul, matmul, paths
from compile_specs.spec import AMD, TARGETS, CompileSpec

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(?:.*?\b(0x[0-9a-f]+)\s*;)?",
    re.MULTILINE,
)
RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


def specs() -> list[CompileSpec]:
    return [
        *decode.PACKED, *decode.EXPERTS, *decode.ROWS, *decode.OFFICIAL, *encode.COUNT, *encode.PACKED, *encode.FAST,
        *encode.OFFICIAL, *matmul.GEMV, *matmul.SUM, *fast.WHOLE, *fast.LEAN, *fast.GROUPS, *fast.EXPERTS,
        *fast.ROWS, *fast_matmul.GEMV, *fast_matmul.DOT, *fast_matmul.IN_ORDER, *fast_matmul.AHEAD,
        *fast_matmul.BANDS, *fast_matmul.EXPERTS, *fast_matmul.SUM,
    ]  # fmt: skip


def dump(option: str, cubin: Path) -> str:
    return subprocess.run([TOOL, option, cubin], check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """Return address, name and last operand (if it is a number) of each instruction, without the padding NOPs."""
    found = INSTRUCTION.findall(sass)
    return [(int(address, 16), name, number) for address, name, number in found if name != "NOP"]


def loops_of(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Return the first and last address of each loop: the target of a backward branch, and the branch.

    Where threads of a warp may diverge, BRA.DIV jumps to the end of the code and a branch jumps back: this is no loop.
    """
    tails = [int(target, 16) for _, name, target in code if name == "BRA.DIV" and target]
    end = min(tails, default=code[-1][0] + 1)
    return [
        (int(target, 16), address)
        for address, name, target in code
        if name.startswith("BRA") and target and int(target, 16) < address < end
    ]


def contains(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]


AMD_INSTRUCTION = re.compile(
    r"^\s+(?:(s_barrier)|((?:s|v|ds|global|flat|buffer|scratch)_\w+))", re.M
)


def measure_amd(spec: CompileSpec, target: str) -> dict[str, Any]:
    """Return one row for an AMD GPU; code is counted once, whatever loops do."""
    compiled = spec.compile(target)
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found
        return int(found[1])

    names = [barrier or other for barrier, other in AMD_INSTRUCTION.findall(code)]
    widest = max(
        (int(n) for n in re.findall(r"(?:global|flat|buffer)_store_dwordx(\d)", code)), default=1
    )
    return {
        "kernel": spec.name,
        "target": target,
        "registers": number("vgpr_count"),
        "spilled_bytes": number("private_segment_fixed_size"),
        "spilled_scalars": number("sgpr_spill_count"),
        "shared_bytes": int(compiled.metadata.shared),
        "barriers": names.count("s_barrier"),
        "instructions": len(names),
        "widest_store_bits": 32 * widest,
    }


def measure(spec: CompileSpec, target: str) -> dict[str, Any]:
    """Return one row of the report."""
    if target in AMD:
        return measure_amd(spec, target)
    compiled = spec.compile(target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        resources = dict(RESOURCE.findall(dump("--dump-resource-usage", cubin)))
        sass = dump("-sass", cubin)
    code = instructions(sass)
    kinds = Counter(name.split(".")[0] for _, name, _ in code)
    ranges = loops_of(code)
    rare = without_escapes(spec, sass, ranges) if spec.has_rare_paths else {}
    if not spec.counts_outer_loops:
        ranges = [one for one in ranges if not any(contains(one, other) for other in ranges)]
    loops = [{address for address, _, _ in code if a <= address <= b} for a, b in ranges]
    in_loops: set[int] = set().union(*loops)
    runs = sum(spec.loop_runs if address in in_loops else 1 for address, _, _ in code)
    per_weight = 32 * spec.num_warps / spec.weights_per_program
    return {
        "kernel": spec.name,
        "target": target,
        "registers": int(resources["REG"]),
        "spilled_bytes": int(resources["STACK"]) + int(resources["LOCAL"]),
        "spills_in_loops": sum(
            name.startswith(("LDL", "STL")) for address, name, _ in code if address in in_loops
        ),
        "shared_bytes": int(compiled.metadata.shared),
        "barriers": kinds["BAR"],
        "barriers_in_loops": sum(
            name.startswith("BAR") for address, name, _ in code if address in in_loops
        ),
        "instructions": kinds.total(),
        "instructions_per_weight": round(runs * per_weight, 2),
        "of_each_loop": [round(len(loop) * spec.loop_runs * per_weight, 2) for loop in loops],
        **rare,
        "widest_store_bits": max(
            int(name.split(".")[2]) if re.match(r"STG\.E\.\d+", name) else 32 for _, name, _ in code
        ),
    }


def without_escapes(
    spec: CompileSpec, sass: str, loops: list[tuple[int, int]]
) -> dict[str, float | None]:
    """Return the instructions per weight where tiles have no escapes and are not raw; None: not found."""
    outer = [one for one in loops if not any(contains(other, one) for other in loops)]
    found = paths.turn(sass, outer)
    if found is None:
        threads, bytes_at_once = 32 * spec.num_warps, 16
        found = paths.program(
            sass, loops, spec.weights_per_program * 2 // (threads * bytes_at_once)
        )
    per_weight = 32 * spec.num_warps / spec.weights_per_program
    return {"without_escapes": None if found is None else round(found * per_weight, 2)}


def measure_by_index(index: int, target: str) -> dict[str, Any]:
    """Return the row of one kernel, given by its index in `specs()`, because specs cannot be sent between processes."""
    return measure(specs()[index], target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    names = [spec.name for spec in specs()]
    parser.add_argument("--kernel", action="append", choices=names, help="default: all")
    args = parser.parse_args()
    pairs = [
        (names.index(name), target)
        for name in args.kernel or names
        for target in args.target or TARGETS
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(measure_by_index, *zip(*pairs, strict=True)))
    if args.json:
        json.dump({"triton": triton.__version__, "kernels": rows}, sys.stdout, indent=1)
        return 0
    heads = list(dict.fromkeys(head for row in rows for head in row))
    rows = [{head: row.get(head, "") for head in heads} for row in rows]
    widths = [max(len(head), *(len(str(row[head])) for row in rows)) for head in heads]
    for line in [heads, *([str(row[head]) for head in heads] for row in rows)]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
