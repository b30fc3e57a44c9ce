"""Measure products with experts that are not decoded first, against vLLM's kernel with BF16 experts, bits first.

Both products of a layer, of tokens that are sorted by experts beforehand: what lies between them, and sorting, are the
same with both. Bits are compared on values whose products cancel, so that another order of additions shows, for the
launch that vLLM chooses for so many tokens and for that of VLLM_BATCH_INVARIANT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bench.kernels.groups import captured
from bench.kernels.held_experts import LAYERS, TINY, Held, Shape, by_expert, choices, weights_of
from bench.kernels.peers import ExpertsKernel, NotHereError
from bench.kernels.timing import Bench
from bench_setup import normal

from vllm_dfloat.device import fast_expert_product, fast_ops
from vllm_dfloat.integration.layers import cancelling

TOKENS = [1, 16, 4, 64, 8, 32, 128, 256]  # the most important come first: time may run out
INVARIANT = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8}
FEW_EXPERTS = 8  # for comparing bits: the order does not depend on their number
Operands = tuple[torch.Tensor, torch.Tensor]


def run(bench: Bench) -> None:
    tiny = {name: replace(shape, inner=128) for name, shape in TINY.items()}
    for name, shape in bench.pick(LAYERS, tiny).items():
        if not bench.begin("experts_fused", f"{name}, bits"):
            continue
        sizes = shape.experts, shape.top_k, *shape.w2[1:]
        if not fast_expert_product.max_tokens(bench.device, *sizes):
            bench.skip("experts_fused", name, "all", "sizes that the kernel does not take")
            continue
        kernel: ExpertsKernel | None = None
        try:
            kernel = ExpertsKernel(bench.device)
            _compare(bench, name, shape, kernel)
        except NotHereError as error:
            bench.skip("experts_fused", name, "vLLM's kernel with BF16 experts", str(error))
        held = Held("fast", weights_of(shape, bench.device))
        for num_tokens in bench.pick(TOKENS, [2]):
            if bench.begin("experts_fused", f"{name}, {num_tokens} tokens"):
                _time(bench, name, shape, held, kernel, num_tokens)


def _compare(bench: Bench, name: str, shape: Shape, kernel: ExpertsKernel) -> None:
    for what, (_, rows, cols) in (("w13", shape.w13), ("w2", shape.w2)):
        x, flat, _ = cancelling.operands(max(TOKENS), FEW_EXPERTS * rows, cols, None, bench.device)
        held, weight = fast_ops.pack_again(flat, what), flat.view(FEW_EXPERTS, rows, cols)
        unequal = []
        for num_tokens in TOKENS:
            chosen = [torch.randperm(FEW_EXPERTS)[:2] for _ in range(num_tokens)]
            ids = torch.stack(chosen).int().to(bench.device)
            parts = torch.rand(num_tokens * 2, device=bench.device)
            given = kernel.config(shape.w13, shape.w2, shape.top_k, num_tokens)
            for config in (given, INVARIANT):
                routed = by_expert(ids, config["BLOCK_SIZE_M"], parts, 2)
                outs = [
                    torch.full((num_tokens * 2, rows), torch.nan, device=bench.device).bfloat16()
                    for _ in range(2)
                ]
                kernel.multiply(x[:num_tokens], weight, routed, outs[0], config)
                part = x[:num_tokens], held.desc, FEW_EXPERTS, rows, cols
                fast_expert_product.launch(*part, routed, None, outs[1])
                if not torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16)):
                    unequal.append(f"{num_tokens} ({config['BLOCK_SIZE_M']} a block)")
        found = f"other bits at {unequal} tokens" if unequal else "equal bits at all tokens"
        bench.tell("experts_fused", f"{name}, {what}", "in order, beside vLLM's kernel", found)


def _time(
    bench: Bench,
    name: str,
    shape: Shape,
    held: Held,
    kernel: ExpertsKernel | None,
    num_tokens: int,
) -> None:
    most = min(shape.experts, num_tokens * shape.top_k)
    ids = choices(bench, shape, num_tokens, bench.num_sets(2 * most * shape.numel))
    parts = torch.rand(num_tokens * shape.top_k).to(bench.device)
    block = 16
    if kernel is not None:
        config = kernel.config(shape.w13, shape.w2, shape.top_k, num_tokens)
        block = config["BLOCK_SIZE_M"]
    routes = [by_expert(each, block, None, shape.top_k) for each in ids]
    num_out = num_tokens * shape.top_k
    xs = [
        normal(num_tokens, shape.hidden, bench.device, seed=1),
        normal(num_out, shape.inner, bench.device, seed=2),
    ]
    outs = [
        torch.empty(num_out, tensor.shape[1], dtype=torch.bfloat16, device=bench.device)
        for tensor in held.tensors
    ]

    def both(multiply: Callable[..., None], i: int) -> Callable[[], None]:
        second = replace(routes[i], top_k=1, weights=parts)

        def work() -> None:
            for x, tensor, routed, out in zip(xs, held.tensors, (routes[i], second), outs, strict=True):  # fmt: skip
                multiply(x, tensor, routed, out)

        return captured(work).replay if bench.is_gpu else work

    def ours(x: torch.Tensor, tensor: Any, routed: Any, out: torch.Tensor) -> None:
        fast_expert_product.launch(x, tensor.packed.desc, *tensor.shape, routed, None, out)

    works: dict[str, list[Callable[[], None]]] = {}
    if kernel is not None:
        of_vllm = lambda x, tensor, routed, out: kernel.multiply(x, tensor.weight, routed, out, config)  # noqa: E731  # fmt: skip
        works["vLLM's kernel with BF16 experts"] = [both(of_vllm, i) for i in range(len(ids))]
    works["without decoding, fast layout"] = [both(ours, i) for i in range(len(ids))]
    calls = {key: lambda i, ready=ready: ready[i]() for key, ready in works.items()}
    case = f"{name}, {num_tokens} token{'s' * (num_tokens > 1)}"
    bench.measure("experts_fused", case, calls, len(ids))
