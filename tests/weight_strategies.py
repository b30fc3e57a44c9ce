"""Hypothesis strategies for BF16 tensors on which a wrong encoder fails first, and names for their features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from helpers import Bits, bf16_bits
from hypothesis import strategies as st

TILE, LANE, STEP = 2048, 128, 8  # weights, in the packed layout
BLOCK_BITS = 8 * 4096  # of the official stream
_EDGES = [
    *(n + d for n in (STEP, 64, LANE, 256, TILE, 2 * TILE) for d in (-1, 0, 1)),
    *(0, 1, 2, 3, 255),
]
_KINDS = (
    "gaussian", "gaussian", "uniform", "one symbol", "two symbols", "few symbols", "every exponent", "specials",
    "high exponents", "rare symbols", "fibonacci",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A tensor described by a few numbers, so that a failing example shrinks to simple numbers, not to a simple array.

    Attributes:
        kind: kind of distribution of its exponents.
        size: number of weights.
        seed: of its random bits.
        base: first exponent of the kind.
    """

    kind: str
    size: int
    seed: int
    base: int

    def bits(self, limit: int = 256) -> Bits:
        """Return the tensor, uint16 [size], with exponents below `limit`."""
        rng = np.random.default_rng(self.seed)
        size, kind = self.size, self.kind
        noise = rng.integers(0, 256, size, np.uint16)
        if kind == "gaussian":
            flat = bf16_bits(rng.standard_normal(size) * 2.0 ** (self.base // 8 - 16))
        elif kind == "specials":
            flat = bf16_bits(rng.standard_normal(size))
            words = np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 1, 0x807F], np.uint16)
            flat[:: 1 + self.base % 7] = rng.choice(words, flat[:: 1 + self.base % 7].size)
        else:
            exponents = self._exponents(rng)
            flat = (noise & 0x80) << 8 | exponents.astype(np.uint16) << 7 | noise & 0x7F
        if limit < 256:
            exponent = flat >> 7 & 0xFF
            flat = flat & 0x807F | (exponent % limit) << 7
        return flat.astype(np.uint16)

    def _exponents(self, rng: np.random.Generator) -> np.ndarray:
        size, base = self.size, self.base
        if self.kind == "uniform":
            return rng.integers(0, 256, size)
        if self.kind == "one symbol":
            return np.full(size, base)
        if self.kind == "two symbols":
            return np.where(rng.random(size) < 0.02, (base + 1) % 256, base)
        if self.kind == "few symbols":
            return (base + rng.geometric(0.4, size)) % 256
        if self.kind == "every exponent":
            return rng.permutation(np.resize(np.arange(256), size))
        if self.kind == "high exponents":
            return rng.integers(230, 256, size)
        if (
            self.kind == "rare symbols"
        ):  # so many that a limit on the rare ones' codes lengthens the common ones'
            rare = np.arange(min(200, size // 8))
            common = rng.geometric(0.6, size - rare.size) + 200
            return rng.permutation(np.concatenate([rare, np.minimum(common, 255)]))
        return np.resize(_fibonacci(rng, base % 60), size)


def _fibonacci(rng: np.random.Generator, first: int) -> np.ndarray:
    """Return the exponents of 20 symbols, each as frequent as the two before it together: codes of up to 20 bits."""
    counts = [1, 1]
    while len(counts) < 20:
        counts.append(counts[-1] + counts[-2])
    return rng.permutation(np.repeat(np.arange(first, first + 20), counts))


def specs(largest: int) -> st.SearchStrategy[Spec]:
    """Return a strategy of tensors of at most `largest` weights; Fibonacci ones have the size that their codes need."""
    edges = [size for size in _EDGES if size <= largest]
    sizes = st.one_of(st.sampled_from(edges), st.integers(0, largest))

    def make(kind: str, size: int, seed: int, base: int) -> Spec:
        if kind == "fibonacci" and seed % 4 == 0:
            size = 17_710 + seed % 64  # the sum of the 20 counts, and a tail
        if kind == "one symbol" and seed % 4 == 0:
            size = BLOCK_BITS + seed // 4 % 3 - 1  # one bit each
        return Spec(kind, size, seed, base)

    return st.builds(
        make, st.sampled_from(_KINDS), sizes, st.integers(0, 1 << 16), st.integers(0, 255)
    )


def features(flat: Bits) -> Iterator[str]:
    """Yield the features of REACHED that a tensor has."""
    exponents = np.unique(flat >> 7 & 0xFF)
    symbols = exponents.size
    magnitude = flat & 0x7FFF
    yield f"{flat.size} weights"
    if symbols == 1:
        yield "one symbol"
    if symbols == 256:
        yield "all 256 exponents"
    if (magnitude == 0x7F80).any():
        yield "Inf"
    if (magnitude > 0x7F80).any():
        yield "NaN"
    if symbols and exponents[-1] >= 240:
        yield "exponents of 240 and more"


SIZES = tuple(f"{size} weights" for size in _EDGES)
REACHED = (*SIZES, "one symbol", "all 256 exponents", "Inf", "NaN", "exponents of 240 and more")
