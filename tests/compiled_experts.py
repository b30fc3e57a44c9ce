"""Compile the product with experts and vLLM's kernel for BF16 experts for a GPU, run both without one, compare bits.

    python tests/compiled_experts.py FOLDER

As compiled_products.py, whose machine it uses. vLLM's kernel is compiled as it is written: this shows that Triton makes
one sum of what its source adds block by block. Prints, as JSON, for each case how many of the results differ.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

import numpy as np
import torch
import triton.language as tl
import vllm_experts
from compile_specs import fast_matmul as specs
from compile_specs.spec import CONSTANT, CompileSpec
from ptx_program import Program
from ptx_races import Watched
from vllm_experts import Sorted

from vllm_dfloat.codec import descriptor, fast_layout
from vllm_dfloat.codec.descriptor import KIND_FAST
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.integration.layers import cancelling
from vllm_dfloat.kernels.fast_planes import LOW_BYTES

EXPERTS, ROWS, COLS, TOP_K = 2, 48, 256, 2
# Addresses; WEIGHTS are those of the router.
X, WEIGHT, BIAS, OUT, DESC, PAYLOAD = (0x10000 * i for i in (1, 2, 4, 5, 7, 8))
IDS, WEIGHTS, PADDED, OF_BLOCK = (0x10000 * i for i in (12, 13, 14, 15))
POISON = 0x7FC1

Bits = np.ndarray


class Case(NamedTuple):
    """A target, tokens, our kernel, and how vLLM launches its own."""

    target: str
    num_x: int
    name: str
    blocks: Mapping[str, int]
    warps: int
    stages: int


def blocks(m: int, n: int, k: int) -> dict[str, int]:
    return {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": 1}


FEW, INVARIANT = (
    blocks(16, 64, 128),
    blocks(64, 64, 32),
)  # vLLM's default, and the one of VLLM_BATCH_INVARIANT
CASES = (
    Case("sm_90", 5, "fast_experts_8", FEW, 4, 4),
    Case("sm_90", 2, "fast_experts_8_unsorted", FEW, 4, 4),
    Case("sm_80", 18, "fast_experts_16", FEW, 4, 4),
    Case("sm_90", 18, "fast_experts_16", INVARIANT, 4, 3),
)


class Operands(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    weights: torch.Tensor  # of the router
    expert_of: torch.Tensor
    by_expert: Sorted | None


def operands(case: Case) -> Operands:
    """Return tokens, of which each goes to both experts, and experts with a raw tile and escapes that are listed."""
    cpu = torch.device("cpu")
    x, weight, bias = cancelling.operands(case.num_x, EXPERTS * ROWS, COLS, torch.bfloat16, cpu)
    assert bias is not None
    spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 9
    weight[:64, 128:] *= torch.exp2(spread.round())
    weight[5, 7], weight[95, 100], weight[64, 255] = 1e-30, 1e20, 0
    expert_of = torch.arange(EXPERTS, dtype=torch.int32).repeat(case.num_x)
    weights = torch.rand(case.num_x * TOP_K, generator=torch.Generator().manual_seed(2))
    is_sorted = not case.name.endswith("unsorted")
    by_expert = vllm_experts.sort(expert_of, case.blocks["BLOCK_SIZE_M"]) if is_sorted else None
    return Operands(x, weight, bias, weights, expert_of, by_expert)


def memory(given: Operands, **rest: Any) -> Bits:
    filled = np.zeros(1 << 20, np.uint8)
    tensors = {"X": given.x, "BIAS": given.bias, "WEIGHTS": given.weights, **rest}
    tensors["OF_BLOCK"] = given.expert_of
    if given.by_expert is not None:
        of = given.by_expert
        tensors |= {"IDS": of.ids, "OF_BLOCK": of.expert_of_block, "PADDED": of.num_padded}
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().ravel() if torch.is_tensor(tensor) else tensor
        filled[globals()[name] : globals()[name] + len(raw)] = raw
    filled[OUT : OUT + 0x10000].view(np.uint16)[:] = POISON
    return filled


def run(compiled: Any, filled: Bits, parameters: list[int], grid: tuple[int, int], num_out: int) -> Bits:  # fmt: skip
    program = Program(compiled.asm["ptx"])
    for second in range(grid[1]):
        for first in range(grid[0]):
            shared = compiled.metadata.shared
            Watched(program, filled, parameters, (first, second), grid, shared).run()
    return filled[OUT : OUT + 2 * num_out * ROWS].view(np.uint16)


def of_vllm(kernel: Any, case: Case) -> Bits:
    given = operands(case)
    of, m, num_out = given.by_expert, case.blocks["BLOCK_SIZE_M"], case.num_x * TOP_K
    num_sorted = num_out * m if of is None else len(of.ids)
    weight = given.weight.view(EXPERTS, ROWS, COLS)
    numbers = vllm_experts.sizes(
        kernel, weight, case.num_x, num_sorted, TOP_K, case.blocks,
        is_sorted=of is not None, has_weights=True, has_bias=True,
    ) | {"compute_type": tl.bfloat16}  # fmt: skip
    pointers = {
        "a_ptr": ("*bf16", X), "b_ptr": ("*bf16", WEIGHT), "c_ptr": ("*bf16", OUT), "b_bias_ptr": ("*bf16", BIAS),
        "topk_weights_ptr": ("*fp32", WEIGHTS), "expert_ids_ptr": ("*i32", OF_BLOCK),
        "num_tokens_post_padded_ptr": ("*i32", PADDED),
    } | ({} if of is None else {"sorted_token_ids_ptr": ("*i32", IDS)})  # fmt: skip
    # Triton's launcher makes a constant of None and of each stride of 1, and knows which sizes 16 divides.
    sizes = {
        name for name, value in numbers.items()
        if (name.startswith("stride_") and value != 1) or name in ("N", "K", "EM", "num_valid_tokens")
    }  # fmt: skip
    constants = {name: value for name, value in numbers.items() if name not in sizes}
    constants |= {
        name: None for name in kernel.arg_names if name not in numbers and name not in pointers
    }
    types = {name: kind for name, (kind, _at) in pointers.items()} | dict.fromkeys(sizes, "i32")
    types |= dict.fromkeys(constants, CONSTANT)
    spec = CompileSpec(
        "vllm", kernel, {name: types[name] for name in kernel.arg_names}, constants,
        (*pointers, *(name for name in sizes if numbers[name] % 16 == 0)), case.warps,
    )  # fmt: skip
    places = {name: at for name, (_kind, at) in pointers.items()} | {n: numbers[n] for n in sizes}
    parameters = [places[name] for name in kernel.arg_names if name in places] + [0, 0]
    filled = memory(given, WEIGHT=given.weight)
    if of is None:
        filled[PADDED : PADDED + 4].view(np.int32)[:] = num_sorted
    tiles = num_sorted // m * -(-ROWS // case.blocks["BLOCK_SIZE_N"])
    compiled = spec.compile(case.target, num_stages=case.stages)
    return run(compiled, filled, parameters, (tiles, 1), num_out)


def of_ours(case: Case) -> Bits:
    (spec,) = [spec for spec in specs.EXPERTS if spec.name == case.name]
    given, num_out = operands(case), case.num_x * TOP_K
    held = encode(given.weight.view(torch.uint16).numpy(), must_be_small=False)
    assert held is not None
    assert (np.diff(held.starts) == fast_layout.RAW_ENTRIES).any()
    salt = descriptor.salt(DESC, fast_layout.size(EXPERTS * ROWS, COLS))
    layout = held.layout
    words = descriptor.words(PAYLOAD, (KIND_FAST, layout.num_entries, layout.base), salt)
    desc = np.array([descriptor.signed(word) for word in words]).view(np.uint8)
    filled = memory(given, DESC=desc, PAYLOAD=held.payload)
    tokens, block, count = spec.constexprs["ROWS"], 1, num_out
    if given.by_expert is not None:
        block = case.blocks["BLOCK_SIZE_M"]
        count = len(given.by_expert.expert_of_block)
    sizes = [salt % (1 << 64), LOW_BYTES, EXPERTS, ROWS, COLS, num_out, block, TOP_K]
    parameters = [DESC, X, BIAS, WEIGHTS, IDS, PADDED, OF_BLOCK, OUT, *sizes, 0, 0]
    grid = ROWS // 16, count * -(-block // tokens)
    return run(spec.compile(case.target), filled, parameters, grid, num_out)


def main() -> int:
    kernel = vllm_experts.load(Path(sys.argv[1]), as_written=True).fused_moe_kernel
    unequal = {}
    for case in CASES:
        expected = of_vllm(kernel, case)
        assert not (expected == POISON).any()
        found = of_ours(case)
        m = case.blocks["BLOCK_SIZE_M"]
        unequal[f"{case.target}, {case.num_x} tokens, {case.name}, blocks of {m}"] = int(
            (found != expected).sum()
        )
    json.dump(unequal, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
