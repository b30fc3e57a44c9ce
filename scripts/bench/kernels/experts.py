"""Measure decoding the experts that got tokens against decoding all, and against vLLM's product with BF16 experts.

Experts are held packed and in the fast layout; a layer's two tensors are decoded into one buffer, as in serving. Each
call takes the next choice of the router, among experts that have left the L2 cache since. The buffer is poisoned before
bits are compared, so that vLLM's kernel would show it if it read an expert without tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench.kernels.held_experts import LAYERS, TINY, Held, Shape, choices, weights_of
from bench.kernels.peers import NotHereError, fused_experts
from bench.kernels.timing import Bench, Call, expect_same_bits
from bench_setup import normal

TOKENS = [1, 16, 256]  # the most important come first: time may run out
LAYOUTS = {"packed": "", "fast": ", fast layout"}  # and how the names of contenders end
Product = Callable[..., torch.Tensor]


def run(bench: Bench) -> None:
    for name, shape in bench.pick(LAYERS, TINY).items():
        if not bench.begin("experts", name):
            continue
        weights = weights_of(shape, bench.device)
        held = [Held(layout, weights) for layout in LAYOUTS]
        for one in held:
            bench.compare(one.check_all, f"all experts{LAYOUTS[one.layout]}, {name}")
        for num_tokens in bench.pick(TOKENS, [1]):
            if bench.begin("experts", f"{name}, {num_tokens} tokens"):
                _measure(bench, name, shape, held, num_tokens)


def _measure(bench: Bench, name: str, shape: Shape, held: Sequence[Held], num_tokens: int) -> None:
    case = f"{name}, {num_tokens} token{'s' * (num_tokens > 1)}"
    most = min(shape.experts, num_tokens * shape.top_k)
    smallest = min(one.packed_bytes for one in held)
    per_expert = 2 * shape.numel + smallest // shape.experts
    ids = choices(bench, shape, num_tokens, bench.num_sets(most * per_expert))
    mean = round(sum(len(each.unique()) for each in ids) / len(ids), 1)
    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, Any]] = {}
    for one in held:
        ending = LAYOUTS[one.layout]
        for each in ids:
            bench.compare(one.check_chosen, each, f"chosen experts{ending}, {case}")
        calls[f"all experts{ending}"] = lambda i, one=one: one.decode_all()
        calls[f"chosen experts{ending}"] = lambda i, one=one: one.decode_chosen(ids[i])
        facts[f"all experts{ending}"] = {"experts": shape.experts}
        facts[f"chosen experts{ending}"] = {"experts": mean}
    try:
        calls |= _products(bench, held, ids, fused_experts(bench.device), case)
    except NotHereError as error:
        bench.skip("experts", case, "vLLM's product with BF16 experts", str(error))
    bench.measure("experts", case, calls, len(ids), facts=facts)


def _products(
    bench: Bench, held: Sequence[Held], ids: list[torch.Tensor], product: Product, case: str
) -> dict[str, Call]:
    weights = [tensor.weight for tensor in held[0].tensors]
    x = normal(len(ids[0]), weights[0].shape[2], bench.device, seed=len(ids[0])) * 50
    parts = torch.rand(ids[0].shape, generator=torch.Generator().manual_seed(1)).to(bench.device)

    def multiply(i: int) -> torch.Tensor:
        return product(x, *weights, parts, ids[i])

    def decode_then_multiply(one: Held, i: int) -> torch.Tensor:
        one.decode_chosen(ids[i])
        return product(x, *one.decoded(), parts, ids[i])

    def check(one: Held) -> None:
        one.poison()
        expect_same_bits(decode_then_multiply(one, 0), multiply(0), f"product, {case}")

    calls: dict[str, Call] = {"vLLM's product with BF16 experts": multiply}
    for one in held:
        bench.compare(check, one)
        name = f"chosen experts{LAYOUTS[one.layout]}, then the product"
        calls[name] = lambda i, one=one: decode_then_multiply(one, i)
    return calls
