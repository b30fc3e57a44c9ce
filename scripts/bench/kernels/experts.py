"""Measure decoding the experts that got tokens against decoding all, and against vLLM's product with BF16 experts.

A layer's two tensors are decoded into one buffer, as in serving. Each call takes the next choice of the router, among
experts that have left the L2 cache since. The buffer is poisoned before bits are compared, so that vLLM's kernel would
show it if it read an expert without tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench.kernels.decode import check_decode
from bench.kernels.peers import NotHereError, fused_experts
from bench.kernels.timing import Bench, Call, WrongBitsError, expect_same_bits
from bench_setup import normal, poisoned

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import experts, ops

TOKENS = [1, 16, 256]  # the most important come first: time may run out
Product = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A layer of routed experts: their number, the inner and outer dimension of each, and how many a token takes."""

    experts: int
    inner: int
    hidden: int
    top_k: int

    @property
    def w13(self) -> tuple[int, int, int]:
        return self.experts, 2 * self.inner, self.hidden

    @property
    def w2(self) -> tuple[int, int, int]:
        return self.experts, self.hidden, self.inner

    @property
    def numel(self) -> int:
        """Weights of one expert."""
        return 3 * self.inner * self.hidden


LAYERS = {
    "Qwen3-30B-A3B": Shape(128, 768, 2048, 8),
    "Qwen3-235B-A22B, TP 8": Shape(128, 192, 4096, 8),
}
TINY = {"tiny": Shape(4, 16, 128, 1)}


def run(bench: Bench) -> None:
    for name, shape in bench.pick(LAYERS, TINY).items():
        if not bench.begin("experts", name):
            continue
        held = Held(shape, bench.device)
        for tensor in held.tensors:
            bench.compare(check_decode, tensor.packed, tensor.weight, f"decode {name}", ops.decode)
        for num_tokens in bench.pick(TOKENS, [1]):
            if bench.begin("experts", f"{name}, {num_tokens} tokens"):
                _measure(bench, name, held, num_tokens)


@dataclass(frozen=True)
class Tensor:
    """One of a layer's tensors [experts, rows, cols], as a matrix, packed, and the memory that it is decoded into."""

    shape: tuple[int, int, int]
    weight: torch.Tensor
    packed: ops.PackedWeight
    out: torch.Tensor
    status: torch.Tensor

    @property
    def decoded(self) -> torch.Tensor:
        return self.out[: self.weight.numel()].view(self.shape)


class Held:
    """A layer's experts, packed, and one buffer for both decoded tensors.

    Attributes:
        shape: of the layer.
        tensors: w13 and w2.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        sizes = [ops.padded_numel(e * rows, cols) for e, rows, cols in (shape.w13, shape.w2)]
        self._buffer = poisoned(sum(sizes), device)
        self._chosen = torch.empty(shape.experts, dtype=torch.int32, device=device)
        self.tensors = []
        for seed, (size, out) in enumerate(
            zip((shape.w13, shape.w2), self._buffer.split(sizes), strict=True)
        ):
            weight = normal(size[0] * size[1], size[2], device, seed)
            packed = ops.pack(weight, "experts")
            status = torch.empty(len(out) // TILE_WEIGHTS, dtype=torch.int32, device=device)
            self.tensors.append(Tensor(size, weight, packed, out, status))

    @property
    def packed_bytes(self) -> int:
        return sum(tensor.packed.num_bytes for tensor in self.tensors)

    def decode_all(self) -> None:
        for one in self.tensors:
            rows, cols = one.weight.shape
            ops.launch_decode(one.packed.desc, rows, cols, one.out, one.status)

    def decode_chosen(self, ids: torch.Tensor) -> None:
        experts.mark_chosen(ids, None, self._chosen)
        for one in self.tensors:
            experts.launch_decode_chosen(
                one.packed.desc, *one.shape, self._chosen, one.out, one.status
            )

    def weights(self) -> list[torch.Tensor]:
        return [one.weight.view(one.shape) for one in self.tensors]

    def decoded(self) -> list[torch.Tensor]:
        return [one.decoded for one in self.tensors]

    def poison(self) -> None:
        self._buffer.copy_(poisoned(self._buffer.numel(), self._buffer.device))
        for one in self.tensors:
            one.status.fill_(experts.STATUS_SKIPPED)

    def check_chosen(self, ids: torch.Tensor, what: str) -> None:
        """Raise WrongBitsError unless exactly the experts of `ids` are decoded into a poisoned buffer."""
        self.poison()
        self.decode_chosen(ids)
        chosen = ids.unique().long()
        for one in self.tensors:
            expect_same_bits(one.decoded[chosen], one.weight.view(one.shape)[chosen], what)
            tiles = experts.count_decoded(one.status, *one.shape)
            expected = len(chosen) * one.weight[: one.shape[1]].numel() // TILE_WEIGHTS
            if tiles != expected:
                raise WrongBitsError(f"{what}: {tiles} tiles decoded; expected {expected}")


def choices(bench: Bench, shape: Shape, num_tokens: int, num_sets: int) -> list[torch.Tensor]:
    """Return `num_sets` choices of a router, int32 [num_tokens, top_k]; single tokens take all experts in turn."""
    generator = torch.Generator().manual_seed(num_tokens)
    hands_per_deck = shape.experts // shape.top_k if num_tokens == 1 else 1
    hands: list[torch.Tensor] = []
    while len(hands) < num_sets * num_tokens:
        deck = torch.randperm(shape.experts, generator=generator)
        hands += deck.split(shape.top_k)[:hands_per_deck]
    ids = torch.stack(hands[: num_sets * num_tokens]).int()
    return list(ids.view(num_sets, num_tokens, shape.top_k).to(bench.device))


def _measure(bench: Bench, name: str, held: Held, num_tokens: int) -> None:
    shape = held.shape
    case = f"{name}, {num_tokens} token{'s' * (num_tokens > 1)}"
    most = min(shape.experts, num_tokens * shape.top_k)
    per_expert = 2 * shape.numel + held.packed_bytes // shape.experts
    ids = choices(bench, shape, num_tokens, bench.num_sets(most * per_expert))
    for each in ids:
        bench.compare(held.check_chosen, each, f"chosen experts, {case}")
    mean = sum(len(each.unique()) for each in ids) / len(ids)
    calls: dict[str, Call] = {
        "all experts": lambda i: held.decode_all(),
        "chosen experts": lambda i: held.decode_chosen(ids[i]),
    }
    facts: dict[str, dict[str, Any]] = {
        "all experts": {"experts": shape.experts},
        "chosen experts": {"experts": round(mean, 1)},
    }
    try:
        calls |= _products(bench, held, ids, fused_experts(bench.device), case)
    except NotHereError as error:
        bench.skip("experts", case, "vLLM's product with BF16 experts", str(error))
    bench.measure("experts", case, calls, len(ids), facts=facts)


def _products(
    bench: Bench, held: Held, ids: list[torch.Tensor], product: Product, case: str
) -> dict[str, Call]:
    num_tokens, device = len(ids[0]), bench.device
    x = normal(num_tokens, held.shape.hidden, device, seed=num_tokens) * 50
    parts = torch.rand(ids[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
    weights, decoded = held.weights(), held.decoded()

    def decode_then_multiply(i: int) -> torch.Tensor:
        held.decode_chosen(ids[i])
        return product(x, *decoded, parts, ids[i])

    def check() -> None:
        held.poison()
        found = decode_then_multiply(0)
        expect_same_bits(found, product(x, *weights, parts, ids[0]), f"product, {case}")

    bench.compare(check)
    return {
        "vLLM's product with BF16 experts": lambda i: product(x, *weights, parts, ids[i]),
        "chosen experts, then the product": decode_then_multiply,
    }
