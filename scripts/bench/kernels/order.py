"""In which order GEMMs add: unequal bits of cuBLASLt, a product in the order of the columns, and the fused product.

See scripts/probe_order.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from vllm_dfloat.device import fast_ops
from vllm_dfloat.kernels import fast_matmul as kernels
from vllm_dfloat.kernels.fast_escapes import _round
from vllm_dfloat.kernels.fast_product import DotShape

BLOCK = 64
BIG = 2.0**25  # beside it an FP32 number loses 1


@triton.jit(do_not_specialize=["num_x"])
def _in_order_kernel(
    w_ptr,  # bfloat16[rows, cols]
    x_ptr,  # bfloat16[num_x, cols]
    out_ptr,  # uint16[num_x, rows], BF16 bits
    rows,
    cols,
    num_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Multiply with one accumulator, columns in order. Grid (ceil(rows / BLOCK),)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.arange(0, BLOCK)
    m = tl.arange(0, ROWS)[None, :]
    w = w_ptr + tl.minimum(n, rows - 1).to(tl.int64) * cols + k[None, :]
    x = x_ptr + m * cols + k[:, None]
    acc = tl.zeros([BLOCK, ROWS], tl.float32)
    for i in tl.range(0, cols, BLOCK, num_stages=3):
        some = tl.load(x + i, mask=m < num_x, other=0.0).to(OPERAND)
        acc = tl.dot(tl.load(w + i).to(OPERAND), some, acc)
    tl.store(out_ptr + m.to(tl.int64) * rows + n, _round(acc), mask=(n < rows) & (m < num_x))


def set_batch_invariant(device: torch.device) -> None:
    """Make torch's settings that vLLM makes under VLLM_BATCH_INVARIANT on sm_90."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
        torch.backends.cuda.preferred_blas_library(backend="cublaslt")


def in_order(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows, cols = weight.shape
    out = torch.empty(len(x), rows, dtype=torch.bfloat16, device=x.device)
    _in_order_kernel[(triton.cdiv(rows, BLOCK),)](
        weight, x, out.view(torch.uint16), rows, cols, len(x), max(16, 1 << (len(x) - 1).bit_length()), BLOCK,
        tl.bfloat16 if x.is_cuda else tl.float32, num_warps=4,
    )  # fmt: skip
    return out


def fused_order(cols: int) -> torch.Tensor:
    """Return the order of columns with which each step of the fused product multiplies 16 neighbours, int64 [cols]."""
    i = torch.arange(cols)
    block, thread, step, half, one = i // 64, i // 16 % 4, i // 4 % 4, i // 2 % 2, i % 2
    return 64 * block + 16 * step + 8 * half + 2 * thread + one


def fused(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    fast = fast_ops.pack(weight)
    assert fast is not None  # Gaussian weights take about 12 bits
    out = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
    kernels.matmul(x, fast.desc, fast.cols, None, out, out, DotShape())
    return out


def cancelling(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Return rows of 2**25, 1 and -2**25 within 64 columns, else zeros."""
    generator = torch.Generator(device=device).manual_seed(1)
    within = torch.rand(rows, 64, generator=generator, device=device).argsort(1)[:, :3]
    first = torch.randint((cols - 64) // 32 + 1, (rows, 1), generator=generator, device=device) * 32
    weight = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device)
    values = torch.tensor([BIG, 1.0, -BIG], dtype=torch.bfloat16, device=device)
    return weight.scatter_(1, within + first, values.expand(rows, 3))


def compare(
    rows: int, cols: int, num_x: Sequence[int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row per kind of matrix [rows, cols] and number of rows of x, with numbers of unequal results."""
    generator = torch.Generator(device=device).manual_seed(5)
    order = fused_order(cols).to(device)
    gaussian = torch.randn(rows, cols, generator=generator, device=device).mul_(0.02).bfloat16()
    normal = torch.randn(max(num_x), cols, generator=generator, device=device).bfloat16()
    kinds = {
        "gaussian": (gaussian, normal),
        "cancelling": (cancelling(rows, cols, device), torch.ones_like(normal)),
    }
    for kind, (weight, inputs) in kinds.items():
        for count in num_x:
            x = inputs[:count].contiguous()
            blas = functional.linear(x, weight)
            found = {
                "in order": in_order(weight, x),
                "row 0 of one row": functional.linear(x[:1], weight),
            }
            # Rows of zeros take more than 14 bits.
            if kind == "gaussian" and count <= kernels.max_rows(DotShape()):
                mixed = weight[:, order].contiguous(), x[:, order].contiguous()
                found |= {"fused": fused(*mixed), "fused, own order": fused(weight, x)}
            differing = {name: unequal(blas[: len(out)], out) for name, out in found.items()}
            yield {
                "kind": kind,
                "rows": rows,
                "cols": cols,
                "num_x": count,
                "of": blas.numel(),
                **differing,
            }


def unequal(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.view(torch.int16) != b.view(torch.int16)).sum())
