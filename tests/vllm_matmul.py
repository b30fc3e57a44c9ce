"""vLLM's own kernel of batch-invariant products, from the source of the vLLM that is installed.

Its module cannot be used as it is: on a CPU vLLM puts a placeholder in Triton's place.
"""

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

# What matmul_persistent uses for BF16, but for shapes that some GPUs have an entry for.
BLOCKS = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8}
NUM_WARPS, NUM_STAGES = 8, 3
_FUNCTIONS = ("_compute_pid", "matmul_kernel_persistent")


def source() -> Path:
    """Return the file of vLLM that has the kernel."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent / "model_executor"
    files = [root / name / "batch_invariant.py" for name in ("determinism", "layers")]
    return next(file for file in files if file.exists())


def load(folder: Path) -> ModuleType:
    """Return a module, written into `folder`, that has only the kernel and the function it calls."""
    return load_functions(folder, source().read_text(), _FUNCTIONS)


def load_functions(folder: Path, text: str, names: Sequence[str]) -> ModuleType:
    """Return a module, written into `folder`, that has the named kernels of a source text, and nothing else."""
    functions = [
        ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    assert len(functions) == len(names)
    name = f"vllm_{names[-1]}"
    file = folder / f"{name}.py"
    lines = ["import triton", "import triton.language as tl"]
    lines += [f"\n\n@triton.jit\n{function}" for function in functions]
    file.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def sizes(
    kernel: Any, num_x: int, rows: int, cols: int, has_bias: bool, blocks: Mapping[str, int]
) -> dict[str, Any]:
    """Return the kernel's arguments that are no pointers, as matmul_persistent gives them for x @ weight.T."""
    given = {
        "M": num_x, "N": rows, "K": cols, "stride_am": cols, "stride_ak": 1, "stride_bk": 1, "stride_bn": cols,
        "stride_cm": rows, "stride_cn": 1, "stride_bias": 1, "NUM_SMS": 108, "A_LARGE": False, "B_LARGE": False,
        "C_LARGE": False, "HAS_BIAS": has_bias, **blocks,
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in kernel.arg_names}


def linear(
    kernel: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: Mapping[str, int] = BLOCKS,
) -> torch.Tensor:
    """Return x @ weight.T + bias from the kernel in Triton's interpreter, which cannot round to BF16 itself."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    num_x, rows = len(flat), len(weight)
    out = torch.full((num_x, rows), float("nan"), dtype=torch.float32)
    tiles = triton.cdiv(num_x, blocks["BLOCK_SIZE_M"]) * triton.cdiv(rows, blocks["BLOCK_SIZE_N"])
    given = sizes(kernel, num_x, *weight.shape, bias is not None, blocks)
    # Where it is compiled, FP32 results take more shared memory than vLLM's, so there are fewer stages.
    kernel[(min(108, tiles),)](flat, weight, out, bias, **given, num_stages=1)
    return out.bfloat16().view(*x.shape[:-1], rows)
