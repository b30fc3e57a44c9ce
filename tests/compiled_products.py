"""Compile the fast product in order and vLLM's batch-invariant product for a GPU, run both without one, compare bits.

    python tests/compiled_products.py FOLDER

For a process of its own, since TRITON_INTERPRET makes functions that cannot be compiled. Prints, as JSON, for each case
how many of the results differ.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

import numpy as np
import torch
import vllm_matmul
from compile_specs import fast_matmul as specs
from compile_specs.spec import CONSTANT, CompileSpec
from ptx_machine import Machine, Program

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.codec.descriptor import KIND_FAST
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.kernels.fast_planes import LOW_BYTES

ROWS, COLS = 96, 384
X, WEIGHT, BIAS, OUT, DESC, PAYLOAD = (0x10000 * i for i in (1, 2, 6, 7, 9, 10))  # addresses
DOT = "fast_in_order_64_32x2x4"  # beyond 32 rows
TUNED = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 8}

Bits = np.ndarray


def operands(num_x: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, weights with a raw tile and escapes that are listed, and a bias."""
    x, weight, bias = cancelling.operands(num_x, ROWS, COLS, torch.bfloat16, torch.device("cpu"))
    assert bias is not None
    spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 9
    weight[:64, 128:256] *= torch.exp2(spread.round())
    weight[5, 7], weight[95, 383], weight[64, 300] = 1e-30, 1e20, 0
    return x, weight, bias


def memory(**tensors: Any) -> Bits:
    found = np.zeros(1 << 20, np.uint8)
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().ravel() if torch.is_tensor(tensor) else tensor
        found[globals()[name] : globals()[name] + len(raw)] = raw
    return found


def run(compiled: Any, memory: Bits, parameters: list[int], blocks: int, num_x: int) -> Bits:
    """Return the bits of the result [num_x, ROWS]."""
    program = Program(compiled.asm["ptx"])
    for block in range(blocks):
        Machine(
            program, memory, parameters, (block, 0), (blocks, 1), compiled.metadata.shared
        ).run()
    return memory[OUT : OUT + 2 * num_x * ROWS].view(np.uint16).copy()


def of_vllm(
    kernel: Any, target: str, num_x: int, blocks: Mapping[str, int], num_warps: int, stages: int
) -> Bits:
    x, weight, bias = operands(num_x)
    given = vllm_matmul.sizes(kernel, num_x, ROWS, COLS, True, blocks)
    # Triton's launcher makes a constant of each stride of 1, and knows which sizes 16 divides.
    constants = {k: v for k, v in given.items() if (k.isupper() and len(k) > 1) or v == 1}
    numbers = {k: v for k, v in given.items() if k not in constants}
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr", "bias_ptr"), "*bf16")
    types = pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, CONSTANT)
    spec = CompileSpec(
        "vllm", kernel, {name: types[name] for name in kernel.arg_names}, constants,
        (*pointers, *(k for k, v in numbers.items() if v % 16 == 0)), num_warps,
    )  # fmt: skip
    places = {"a_ptr": X, "b_ptr": WEIGHT, "c_ptr": OUT, "bias_ptr": BIAS} | numbers
    parameters = [places[name] for name in kernel.arg_names if name in places] + [0, 0]
    tiles = -(-ROWS // blocks["BLOCK_SIZE_N"]) * -(-num_x // blocks["BLOCK_SIZE_M"])
    filled = memory(X=x, WEIGHT=weight, BIAS=bias)
    return run(spec.compile(target, num_stages=stages), filled, parameters, tiles, num_x)


def of_ours(name: str, target: str, num_x: int, **changes: Any) -> Bits:
    (spec,) = [spec for spec in specs.IN_ORDER + specs.AHEAD if spec.name == name]
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
    blocks = -(-ROWS // spec.constexprs["BN"])
    return run(compiled, filled, [DESC, X, BIAS, OUT, *sizes, 0, 0], blocks, num_x)


def main() -> int:
    kernel = vllm_matmul.load(Path(sys.argv[1])).matmul_kernel_persistent
    unequal: dict[str, int] = {}
    default = vllm_matmul.BLOCKS, vllm_matmul.NUM_WARPS, vllm_matmul.NUM_STAGES
    tuned = TUNED, 4, 5
    for target, num_x, name, blocks in (
        ("sm_80", 3, "fast_ahead_in_order_8", default),
        ("sm_80", 16, "fast_ahead_in_order_16", default),
        ("sm_89", 5, "fast_ahead_in_order_16_8", default),
        ("sm_90", 16, "fast_ahead_in_order_16", tuned),
        ("sm_80", 33, DOT, default),
    ):
        expected = of_vllm(kernel, target, num_x, *blocks)
        unequal[f"{target}, {num_x} rows"] = int((of_ours(name, target, num_x) != expected).sum())
    expected = of_vllm(kernel, "sm_80", 16, *default)
    for what, found in {
        "16 columns of every 64": of_ours("fast_ahead_in_order_16", "sm_80", 16, IN_ORDER=False),
        "columns of two steps mixed": of_ours(DOT, "sm_80", 16, ROWS=16, WIDTH=2),
    }.items():
        unequal[what] = int((found != expected).sum())
    json.dump({"of": ROWS * 16, "unequal": unequal}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
