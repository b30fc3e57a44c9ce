"""A layer's routed experts held compressed, in one of the layouts, and what its router may choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bench.kernels.timing import Bench, WrongBitsError, expect_no_status, expect_same_bits
from bench_setup import normal, poisoned

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.device import experts
from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.kernels.routed import Routed


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


def weights_of(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """Return w13 and w2 in BF16, [experts, rows, cols]."""
    return [
        normal(size[0] * size[1], size[2], device, seed).view(size)
        for seed, size in enumerate((shape.w13, shape.w2))
    ]


@dataclass(frozen=True)
class Tensor:
    """One of a layer's tensors [experts, rows, cols], compressed as a matrix, and the memory it is decoded into."""

    weight: torch.Tensor
    packed: PackedWeight
    out: torch.Tensor
    status: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, rows, cols = self.weight.shape
        return num_experts, rows, cols

    @property
    def decoded(self) -> torch.Tensor:
        return self.out[: self.weight.numel()].view(self.shape)


class Held:
    """A layer's experts in one layout, and one buffer for both decoded tensors, as in serving.

    Attributes:
        layout: "packed" or "fast".
        tensors: w13 and w2.
    """

    def __init__(self, layout: str, weights: list[torch.Tensor]) -> None:
        self.layout, self._functions = layout, BY_NAME[layout]
        device = weights[0].device
        sizes = [self._functions.scratch_numel(w[..., 0].numel(), w.shape[2]) for w in weights]
        self._buffer = poisoned(sum(sizes), device)
        self._chosen = torch.empty(len(weights[0]), dtype=torch.int32, device=device)
        self.tensors = []
        for weight, out in zip(weights, self._buffer.split(sizes), strict=True):
            packed = self._functions.pack(weight.flatten(0, 1), "experts")
            status = torch.empty(len(out) // TILE_WEIGHTS, dtype=torch.int32, device=device)
            self.tensors.append(Tensor(weight, packed, out, status))

    @property
    def packed_bytes(self) -> int:
        return sum(tensor.packed.num_bytes for tensor in self.tensors)

    def decode_all(self) -> None:
        for one in self.tensors:
            rows, cols = one.packed.rows, one.packed.cols
            self._functions.decode(one.packed.desc, rows, cols, one.out, one.status)

    def decode_chosen(self, ids: torch.Tensor) -> None:
        decode = self._functions.decode_chosen
        assert decode is not None
        experts.mark_chosen(ids, None, self._chosen)
        for one in self.tensors:
            decode(one.packed.desc, *one.shape, self._chosen, one.out, one.status)

    def decoded(self) -> list[torch.Tensor]:
        return [one.decoded for one in self.tensors]

    def poison(self) -> None:
        self._buffer.copy_(poisoned(self._buffer.numel(), self._buffer.device))
        for one in self.tensors:
            one.status.fill_(experts.STATUS_SKIPPED)

    def check_all(self, what: str) -> None:
        """Raise WrongBitsError unless all experts are decoded into a poisoned buffer."""
        self.poison()
        self.decode_all()
        for one in self.tensors:
            expect_no_status(one.status[: self._num_tiles(one, range(one.shape[0]))], what)
            expect_same_bits(one.decoded, one.weight, what)

    def check_chosen(self, ids: torch.Tensor, what: str) -> None:
        """Raise WrongBitsError unless exactly the experts of `ids` are decoded into a poisoned buffer."""
        self.poison()
        self.decode_chosen(ids)
        chosen = ids.unique().long()
        for one in self.tensors:
            expect_same_bits(one.decoded[chosen], one.weight[chosen], what)
            tiles = int((one.status != experts.STATUS_SKIPPED).sum())
            expected = self._num_tiles(one, chosen.tolist())
            if tiles != expected:
                raise WrongBitsError(f"{what}: {tiles} tiles decoded; expected {expected}")

    def _num_tiles(self, one: Tensor, chosen: list[int] | range) -> int:
        """Return how many tiles these experts touch."""
        _, rows, cols = one.shape
        size, tile, across = rows * cols, TILE_WEIGHTS, 1
        if self.layout == "fast":
            size, tile, across = rows, fast_layout.TILE_ROWS, -(-cols // fast_layout.TILE_COLS)
        return across * len(
            {t for e in chosen for t in range(e * size // tile, ((e + 1) * size - 1) // tile + 1)}
        )


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


def by_expert(ids: torch.Tensor, block: int, parts: torch.Tensor | None, top_k: int) -> Routed:
    """Return the rows of a result, one for each of `ids`, sorted by expert in blocks, as vLLM sorts them.

    Args:
        ids: int32 [num_tokens, experts of a token].
        parts: FP32, a row's weight of the router, flat, or None.
        top_k: rows of the result per row of activations.
    """
    flat = ids.view(-1)
    order = flat.argsort(stable=True)
    experts, counts = flat.unique(return_counts=True)
    blocks = -(-counts // block)
    places = torch.full((int(blocks.sum()), block), len(flat), dtype=torch.int32, device=ids.device)
    starts = (blocks.cumsum(0) - blocks).tolist()
    for mine, start in zip(order.split(counts.tolist()), starts, strict=True):
        places.view(-1)[start * block :][: len(mine)] = mine.int()
    padded = torch.tensor([places.numel()], dtype=torch.int32, device=ids.device)
    each = experts.repeat_interleave(blocks).int()
    return Routed(places.view(-1), padded, each, block, len(ids), top_k, parts)
