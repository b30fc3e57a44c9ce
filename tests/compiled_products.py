"""Compile the fast product in order and vLLM's batch-invariant product for a GPU, run both without one, compare bits.

    python tests/compiled_products.py FOLDER

For a process of its own, since TRITON_INTERPRET makes functions that cannot be compiled. Prints, as JSON, for each case
how many of the results differ. Tensor cores add one product after the other here, so that not even two columns of a
step can be exchanged unseen; asynchronous steps and copies are done once as soon as they are begun, and once not before
they are waited for.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

import numpy as np
import torch
import vllm_matmul
from compile_specs import fast_matmul as specs
from compile_specs.spec import CONSTANT, CompileSpec
from ptx_machine import Machine
from ptx_program import Program
from ptx_races import Watched

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.codec.descriptor import KIND_FAST
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.kernels.fast_planes import LOW_BYTES

ROWS, COLS = 96, 512
X, WEIGHT, BIAS, OUT, DESC, PAYLOAD = (0x10000 * i for i in (1, 4, 7, 8, 9, 10))  # addresses
WAIT = "wgmma.wait_group.sync.aligned "
GROUPS = "fast_in_order_64"  # on Hopper on the tensor cores of a warp group


class Launch(NamedTuple):
    """How vLLM launches its kernel."""

    blocks: Mapping[str, int]
    warps: int
    stages: int


def tuned(m: int, n: int) -> Launch:
    """Return a launch as of the entries that vLLM has for shapes of Qwen3 and Llama on Hopper."""
    sizes = {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8}
    return Launch(sizes, 4, 5)


DEFAULT = Launch(vllm_matmul.BLOCKS, vllm_matmul.NUM_WARPS, vllm_matmul.NUM_STAGES)
EQUAL = (
    ("sm_80", 3, "fast_ahead_in_order_8_16x2", DEFAULT),
    ("sm_80", 16, "fast_ahead_in_order_16_8x2", DEFAULT),
    ("sm_89", 5, "fast_bands_16", DEFAULT),
    ("sm_90", 16, "fast_ahead_in_order_16_8x2", tuned(16, 128)),
    ("sm_90", 16, "fast_ahead_in_order_16_16x2", DEFAULT),
    ("sm_90", 9, "fast_bands_16", tuned(16, 128)),
    ("sm_80", 33, "fast_bands_64", DEFAULT),
    ("sm_90", 20, "fast_bands_32", tuned(32, 128)),
    ("sm_90", 64, "fast_bands_64", tuned(64, 128)),
    ("sm_90", 70, "fast_bands_64", tuned(64, 128)),
    ("sm_90", 64, GROUPS, DEFAULT),
    ("sm_90", 64, GROUPS, tuned(64, 64)),
    ("sm_90", 64, GROUPS, tuned(32, 128)),
)

Bits = np.ndarray


def operands(num_x: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, weights with a raw tile and escapes that are listed, and a bias."""
    x, weight, bias = cancelling.operands(num_x, ROWS, COLS, torch.bfloat16, torch.device("cpu"))
    assert bias is not None
    spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 9
    weight[:64, 128:256] *= torch.exp2(spread.round())
    weight[5, 7], weight[95, COLS - 1], weight[64, 300] = 1e-30, 1e20, 0
    return x, weight, bias


def memory(**tensors: Any) -> Bits:
    found = np.zeros(1 << 20, np.uint8)
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().ravel() if torch.is_tensor(tensor) else tensor
        found[globals()[name] : globals()[name] + len(raw)] = raw
    return found


def run(
    ptx: str, filled: Bits, parameters: list[int], blocks: int, num_x: int, shared: int
) -> Bits:
    """Return the bits of the result, [2, num_x * ROWS]: of work done at once, and as late as it may be."""
    program, found = Program(ptx), []
    # What waits for each other at an mbarrier is not watched, nor is memory that tensor cores read by themselves.
    machine = Machine if "wgmma" in ptx or "cp.async" in ptx else Watched
    for is_late in (False, True):
        kept, grid = filled.copy(), (blocks, 1)
        for block in range(blocks):
            place = (block, 0)
            machine(program, kept, parameters, place, grid, shared, 1, is_late).run()
        found.append(kept[OUT : OUT + 2 * num_x * ROWS].view(np.uint16))
    return np.stack(found)


def of_vllm(kernel: Any, target: str, num_x: int, launch: Launch, waits: str = "") -> Bits:
    """Return what `run` does; `waits`: how many steps may not be done where it waits for all but one."""
    blocks = launch.blocks
    x, weight, bias = operands(num_x)
    given = vllm_matmul.sizes(kernel, num_x, ROWS, COLS, True, blocks)
    # Triton's launcher makes a constant of each stride of 1, and knows which sizes 16 divides.
    constants = {k: v for k, v in given.items() if (k.isupper() and len(k) > 1) or v == 1}
    numbers = {k: v for k, v in given.items() if k not in constants}
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr", "bias_ptr"), "*bf16")
    types = pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, CONSTANT)
    spec = CompileSpec(
        "vllm", kernel, {name: types[name] for name in kernel.arg_names}, constants,
        (*pointers, *(k for k, v in numbers.items() if v % 16 == 0)), launch.warps,
    )  # fmt: skip
    places = {"a_ptr": X, "b_ptr": WEIGHT, "c_ptr": OUT, "bias_ptr": BIAS} | numbers
    parameters = [places[name] for name in kernel.arg_names if name in places] + [0, 0]
    tiles = -(-ROWS // blocks["BLOCK_SIZE_N"]) * -(-num_x // blocks["BLOCK_SIZE_M"])
    filled = memory(X=x, WEIGHT=weight, BIAS=bias)
    compiled = spec.compile(target, num_stages=launch.stages)
    ptx = compiled.asm["ptx"]
    if waits:
        assert WAIT + "1" in ptx
        ptx = ptx.replace(WAIT + "1", WAIT + waits)
    return run(ptx, filled, parameters, tiles, num_x, compiled.metadata.shared)


def of_ours(name: str, target: str, num_x: int, **changes: Any) -> Bits:
    (spec,) = [spec for spec in specs.IN_ORDER + specs.AHEAD + specs.BANDS if spec.name == name]
    spec = replace(spec, constexprs=spec.constexprs | changes)
    x, weight, bias = operands(num_x)
    held = encode(weight.view(torch.uint16).numpy(), must_be_small=False)
    assert held is not None
    lay = held.layout
    assert (np.diff(held.starts) == fast_layout.RAW_ENTRIES).any()
    salt = descriptor.salt(DESC, fast_layout.size(ROWS, COLS))
    words = descriptor.words(PAYLOAD, (KIND_FAST, lay.num_entries, lay.base), salt)
    desc = np.array([descriptor.signed(word) for word in words]).view(np.uint8)
    filled = memory(X=x, BIAS=bias, DESC=desc, PAYLOAD=held.payload)
    sizes = [salt % (1 << 64), LOW_BYTES, ROWS, COLS, num_x]
    compiled = spec.compile(target, num_stages=spec.constexprs.get("STAGES", 1))
    at_once, bands = spec.constexprs["ROWS"], specs.bands(spec.constexprs["ROWS"], spec.num_warps)
    blocks = -(-ROWS // spec.constexprs.get("BN", bands.rows)) * -(-num_x // at_once)
    parameters = [DESC, X, BIAS, OUT, *sizes, 0, 0]
    shared = compiled.metadata.shared
    return run(compiled.asm["ptx"], filled, parameters, blocks, num_x, shared)


def main() -> int:
    kernel = vllm_matmul.load(Path(sys.argv[1])).matmul_kernel_persistent
    unequal: dict[str, int] = {}
    known: dict[str, Bits] = {}

    def plain(target: str, num_x: int, launch: Launch = DEFAULT) -> Bits:
        """Return what `of_vllm` does, found once for each case."""
        case = f"{target} {num_x} {launch}"
        if case not in known:
            known[case] = of_vllm(kernel, target, num_x, launch)
        return known[case]

    for target, num_x, name, launch in EQUAL:
        expected = plain(target, num_x, launch)
        m, n = launch.blocks["BLOCK_SIZE_M"], launch.blocks["BLOCK_SIZE_N"]
        case = f"{target}, {num_x} rows, {name}, vLLM's blocks of {m} x {n}"
        # With the first of vLLM's, so that its own kernel is held to account too.
        found = of_ours(name, target, num_x) != expected[0]
        unequal[case] = int(found.sum() + (expected[1] != expected[0]).sum())
    found = of_ours(GROUPS, "sm_90", 64, WAITS=True) != expected[0]
    unequal["sm_90, 64 rows, each turn with a wait"] = int(found.sum())
    few, many = (plain("sm_80", num_x)[0] for num_x in (16, 64))
    for what, other, expected in (
        (
            "16 columns of every 64",
            of_ours("fast_ahead_16", "sm_80", 16),
            few,
        ),
        ("columns of two steps mixed", of_ours(GROUPS, "sm_80", 16, ROWS=16), few),
        (
            "a warp group's 16 columns of every 64",
            of_ours(GROUPS, "sm_90", 64, IN_ORDER=False),
            many,
        ),
        ("operands that are not waited for", of_vllm(kernel, "sm_90", 16, DEFAULT, "9"), few),
    ):
        unequal[what] = int((other != expected).sum())
    json.dump({"of": ROWS * 16, "unequal": unequal}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
