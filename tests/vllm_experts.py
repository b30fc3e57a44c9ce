"""vLLM's own Triton kernel for BF16 experts, from the source of the vLLM that is installed; see vllm_matmul.py."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
import vllm_matmul

BLOCKS = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
_FUNCTIONS = ("write_zeros_to_output", "fused_moe_kernel")
# As Triton compiles it (tests/kernels/test_compiled_order.py); its interpreter would add from zero in each turn.
_ADDED, _IN_ORDER = "accumulator += tl.dot(a, b)\n", "accumulator = tl.dot(a, b, accumulator)\n"


def load(folder: Path, *, as_written: bool = False) -> ModuleType:
    """Return a module, written into `folder`, with the kernel: with one sum over all columns, or as written."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin).parent / "model_executor/layers/fused_moe/fused_moe.py"
    text = file.read_text()
    assert text.count(_ADDED) >= 1
    return vllm_matmul.load_functions(
        folder, text if as_written else text.replace(_ADDED, _IN_ORDER), _FUNCTIONS
    )


@dataclass(frozen=True)
class Sorted:
    """Tokens sorted by experts, as vLLM's op does it.

    Attributes:
        ids: int32 [blocks * block], rows of the result, or their number for none.
        expert_of_block: int32 [blocks].
        num_padded: int32 [1].
    """

    ids: torch.Tensor
    expert_of_block: torch.Tensor
    num_padded: torch.Tensor


def sort(expert_of: torch.Tensor, block: int, spare: int = 1) -> Sorted:
    """Sort by expert the rows of a result, of which each has one; `spare`: blocks that are not used."""
    flat = expert_of.view(-1)
    ids, experts = [], []
    for expert in flat.unique().tolist():
        (mine,) = (flat == expert).nonzero(as_tuple=True)
        blocks = -(-len(mine) // block)
        filled = torch.full((blocks * block,), len(flat), dtype=torch.int32)
        filled[: len(mine)] = mine.int()
        ids.append(filled)
        experts += [expert] * blocks
    padded = torch.tensor([len(experts) * block], dtype=torch.int32)
    rest = torch.zeros(spare * block, dtype=torch.int32)  # beyond num_padded: whatever was there
    return Sorted(
        torch.cat([*ids, rest]), torch.tensor(experts + [0] * spare, dtype=torch.int32), padded
    )


def sizes(
    kernel: Any, weight: torch.Tensor, num_x: int, num_sorted: int, top_k: int, blocks: Mapping[str, int],
    *, is_sorted: bool, has_weights: bool, has_bias: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the kernel's arguments that are no pointers, as invoke_fused_moe_triton_kernel gives them."""
    _num_experts, rows, cols = weight.shape
    nothing = dict.fromkeys(("stride_asm", "stride_ask", "stride_bse", "stride_bsk", "stride_bsn"), 0)  # fmt: skip
    given = {
        "N": rows, "K": cols, "EM": num_sorted, "num_valid_tokens": num_x * top_k, "stride_am": cols, "stride_ak": 1,
        "stride_be": rows * cols, "stride_bk": 1, "stride_bn": cols, "stride_cm": rows, "stride_cn": 1, **nothing,
        "stride_bbe": rows if has_bias else 0, "stride_bbn": int(has_bias), "group_n": 0, "group_k": 0,
        "naive_block_assignment": not is_sorted, **blocks, "SPLIT_K": 1, "MUL_ROUTED_WEIGHT": has_weights,
        "top_k": top_k, "compute_type": tl.float32, "use_fp8_w8a8": False, "use_int8_w8a8": False,
        "use_int8_w8a16": False, "per_channel_quant": False, "HAS_BIAS": has_bias, "SWAP_AB": False, "USE_TD": False,
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in kernel.arg_names}


def multiply(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_of: torch.Tensor | Sorted,
    top_k: int,
    weights: torch.Tensor | None,
    bias: torch.Tensor | None,
    blocks: Mapping[str, int] = BLOCKS,
) -> torch.Tensor:
    """Return BF16 [tokens * top_k, rows] from the kernel in Triton's interpreter, which cannot round to BF16 itself.

    expert_of: sorted rows, or the expert of each row where vLLM gives each row a block.
    """
    block, num_out = blocks["BLOCK_SIZE_M"], len(x) * top_k
    is_sorted = isinstance(expert_of, Sorted)
    if isinstance(expert_of, Sorted):
        ids, experts, padded = expert_of.ids, expert_of.expert_of_block, expert_of.num_padded
        num_sorted = len(ids)
    else:
        ids, experts, num_sorted = None, expert_of.view(-1), num_out * block
        padded = torch.tensor([num_sorted], dtype=torch.int32)
    out = torch.full((num_out, weight.shape[1]), float("nan"))
    numbers = sizes(
        kernel, weight, len(x), num_sorted, top_k, blocks, is_sorted=is_sorted, has_weights=weights is not None,
        has_bias=bias is not None,
    )  # fmt: skip
    grid = triton.cdiv(num_sorted, block) * triton.cdiv(weight.shape[1], blocks["BLOCK_SIZE_N"])
    kernel[(grid,)](x, weight, out, bias, None, None, weights, ids, experts, padded, **numbers)
    return out.bfloat16()
