"""Small checks of the kernels of the fast layout: on a GPU decoders in the plain form too, without PRMT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench.checks.sizes import some_rows
from bench.kernels.fast_decode import check_decode, check_rows, check_run, pack
from bench.kernels.fast_fused import Kernel, check_product, hard
from bench.kernels.groups import FastGroup
from bench.kernels.held_experts import by_expert
from bench.kernels.timing import WrongBitsError, expect_same_bits
from bench_setup import normal

from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.device import experts, fast_encode, fast_experts, fast_fused, fast_ops
from vllm_dfloat.kernels import fast_decode, fast_experts_matmul, fast_rows
from vllm_dfloat.kernels import fast_experts as chosen_kernels
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.fast_escapes import PATCHED, PERMUTED, PLAIN

Decode = Callable[..., Any]


def _forms(name: str, as_used: Decode, kernel: Decode, device: torch.device) -> dict[str, Decode]:
    """Return what decodes, by names for messages: as an engine does, on an NVIDIA GPU with PRMT, and there plainly."""
    plainly = {f"{name}, plain": partial(kernel, prmt=False)} if _has_prmt(device) else {}
    return {name: as_used} | plainly


def _has_prmt(device: torch.device) -> bool:
    return device.type == "cuda"  # the interpreter has the plain form alone


def _rows_of_kernel(
    desc: torch.Tensor, ids: torch.Tensor, rows: int, cols: int, prmt: bool
) -> torch.Tensor:
    out = torch.full((len(ids), cols), torch.nan, dtype=torch.bfloat16, device=desc.device)
    fast_rows.decode_rows(desc, ids, rows, cols, out, prmt=prmt)
    return out


def _hard_edges(device: torch.device) -> torch.Tensor:
    weight = normal(200, 650, device, seed=3)
    weight[64:128, 640:] = -0.0
    weight[5, ::7] = 0.0
    return weight


def fast_in_order(device: torch.device) -> None:
    """Check the product in order: within its bound, and the same every time. For its order: bench.kernels.in_order."""
    weight, is_gpu = hard(device), device.type == "cuda"
    matrix, product = pack(weight), config_of(device).fast_product
    for num_x in (1, 17, 40, 130) if is_gpu else (1,):
        x = normal(num_x, matrix.cols, device, seed=num_x) * 50
        for shape in {
            product.in_order_shape(rows, matrix.cols, num_x, is_gpu)
            for rows in (28_672, 6144, 4096)
        }:
            kernel = Kernel(shape, PERMUTED if is_gpu else PLAIN, num_x)
            check_product(x, matrix, weight, kernel)


def fast_encoder(device: torch.device) -> None:
    """Check the bytes of the encoding kernels, for every factor of columns, with escapes and a raw tile."""
    for cols in (650, 648, 640):
        weight = _hard_edges(device)[:, :cols].contiguous()
        found = fast_encode.encode(weight)
        expected = encode(weight.cpu().view(torch.uint16).numpy())
        if found is None or expected is None:
            raise WrongBitsError(f"fast_encode: {cols} columns were not held")
        payload = torch.from_numpy(expected.payload).to(device)
        if found[0] != expected.layout or not torch.equal(found[1], payload):
            raise WrongBitsError(f"fast_encode: other bytes than the CPU's, {cols} columns")


def fast_run(device: torch.device) -> None:
    """Check runs of rows, with escapes, a raw tile and rows that end within a group of 16; and of whole tiles."""
    weight = _hard_edges(device)
    fast = pack(weight)
    whole = normal(192, 512, device, seed=4)
    fast_whole = pack(whole)
    used = fast_ops.launch_decode_run
    for what, decode in _forms("fast_decode_run", used, fast_decode.decode_run, device).items():
        for first, count in ((0, 64), (64, 128), (128, 72)):
            check_run(fast, weight, first, count, f"{what} of {count} rows", decode)
        check_run(fast_whole, whole, 64, 128, f"{what} of whole tiles", decode)


def fast_chosen(device: torch.device) -> None:
    """Check chosen experts in the fast layout, which share blocks of rows with others; with escapes and a raw tile."""
    weight = normal(3 * 90, 650, device, seed=5)
    weight[192:256, 128:256] = -0.0
    weight[200, ::7] = 0.0
    used = fast_experts.launch_decode_chosen
    for what, decode in _forms("fast_chosen", used, chosen_kernels.decode_chosen, device).items():
        for shape in ((3, 90, 650), (3, 64, 512)):
            num_experts, rows, cols = shape
            part = weight[: num_experts * rows, :cols].contiguous()
            fast = pack(part)
            out = torch.full((part.numel(),), torch.nan, dtype=torch.bfloat16, device=device)
            tiles = fast_ops.num_tiles(num_experts * rows, cols)
            status = torch.full((tiles,), -1, dtype=torch.int32, device=device)
            chosen = torch.empty(num_experts, dtype=torch.int32, device=device)
            experts.mark_chosen(torch.tensor([[2, -1, 5], [2, 2, 2]], device=device), None, chosen)
            decode(fast.desc, *shape, chosen, out, status)
            expect_same_bits(out.view(shape)[2], part.view(shape)[2], f"{what} of {shape}")
            if not out.view(shape)[0].isnan().all() or set(status.tolist()) != {0, -1}:
                raise RuntimeError(f"{what} of {shape}: experts without tokens were written")


def fast_group(device: torch.device) -> None:
    """Check a group with members of every factor of columns, escapes and a raw tile; and one of whole blocks."""
    shapes = [(200, 650), (1, 1), (70, 328), (64, 512)]
    weights = [normal(*shape, device, seed=i) for i, shape in enumerate(shapes)]
    weights[0][64:128, 640:] = -0.0
    weights[2][5, ::7] = 0.0
    whole = [normal(64, cols, device, seed=cols) for cols in (512, 1024)]
    for what, members in (("fast_group", weights), ("fast_group of whole blocks", whole)):
        group = FastGroup(members)
        for form, work in _forms(what, group.at_once, group.with_prmt, device).items():
            group.check(form, work)


def fast_experts_product(device: torch.device) -> None:
    """Check products with experts: sorted tokens and others have the bits of each expert's own product in order."""
    num_experts, rows, cols, top_k = 4, 80, 256, 2
    is_gpu = device.type == "cuda"
    weight = normal(num_experts * rows, cols, device, seed=6)
    if not is_gpu:  # the interpreter's order depends on shapes: numbers whose sums are exact
        weight = (weight * 100).round()
    weight[64:128, 128:] = -0.0
    weight[200, ::7] = 0.0
    whole = fast_ops.pack_again(weight, "experts")
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    each = [fast_ops.pack_again(part, "expert") for part in weight.split(rows)]
    scratch = nothing.view(torch.bfloat16), nothing
    for num_x, block in ((3, 1), (40, 16), (40, 64)) if is_gpu else ((2, 1), (3, 16)):
        x = normal(num_x, cols, device, seed=num_x) * 50
        x = x if is_gpu else x.round()
        chosen = [torch.randperm(num_experts, device=device)[:top_k] for _ in range(num_x)]
        ids = torch.stack(chosen).int()
        routed = by_expert(ids, block, None, top_k)
        if block == 1:  # not sorted
            routed = replace(routed, ids=None, num_padded=None, expert_of_block=ids.view(-1))
        expected = torch.empty(num_x, top_k, rows, dtype=torch.bfloat16, device=device)
        for expert, held in enumerate(each):
            of_all = fast_fused.launch_in_order(x, held.desc, rows, cols, None, scratch)
            expected[ids == expert] = of_all.repeat_interleave((ids == expert).sum(1), 0)
        for form in (PLAIN, PATCHED, PERMUTED) if is_gpu else (PLAIN,):
            out = torch.full((num_x * top_k, rows), torch.nan, dtype=torch.bfloat16, device=device)
            fast_experts_matmul.multiply(x, whole.desc, num_experts, cols, routed, None, out, form)
            expect_same_bits(
                out, expected, f"product with experts, {num_x} tokens, {block}, form {form}"
            )


def fast_held(device: torch.device) -> None:
    """Check the fast layout with escapes, a raw tile, and rows that end within a group of 16."""
    weight = _hard_edges(device)
    fast, ids = pack(weight), some_rows(weight)
    used = fast_ops.decode
    for what, decode in _forms("fast_decode", used, fast_decode.decode, device).items():
        check_decode(fast, weight, what, decode)
    for what, decode in _forms("fast_rows", fast_ops.decode_rows, _rows_of_kernel, device).items():
        check_rows(fast, weight, ids, what, decode)
