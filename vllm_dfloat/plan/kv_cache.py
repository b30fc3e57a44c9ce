"""How many tokens fit a KV cache of some bytes: vLLM's groups of layers, KV blocks and capacity.

All groups of layers take KV blocks from one pool. Layers with and without a window are in different groups, with about
the same number of layers each, so that all KV blocks have the same size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import UnsupportedError

DTYPE_BYTES = {
    "auto": 2, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1,
}  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Reach:
    """How far attention looks back: over the last `tokens`, or over the token's chunk of `tokens`.

    `tokens` is None if it looks at everything.
    """

    tokens: int | None = None
    is_chunk: bool = False


EVERYTHING = Reach()


@dataclass(frozen=True)
class Group:
    """Layers that share a table of KV blocks."""

    layers: tuple[int, ...]
    reach: Reach


def group_layers(reaches: Sequence[Reach]) -> list[Group]:
    """Return vLLM's groups of layers.

    Args:
        reaches: of the model's layers, in order.
    """
    kinds: dict[Reach, list[int]] = {}
    for layer, reach in enumerate(reaches):
        kinds.setdefault(reach, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for reach, layers in kinds.items():
        step = cdiv(len(layers), size)
        groups += [Group(tuple(layers[i::step]), reach) for i in range(step)]
    return groups


@dataclass(frozen=True)
class KVCache:
    """The shape of the cache on one rank, and its capacity.

    Attributes:
        groups: of the whole model.
        page_bytes: of one block of one layer: keys and values of this rank's heads, or latent vectors.
        block_size: tokens per block.
        in_flight: tokens that may be scheduled before others are freed: batches at once times tokens per batch.
    """

    groups: tuple[Group, ...]
    page_bytes: int
    block_size: int
    in_flight: int

    def block_bytes(self, layers: range) -> int:
        """Return the bytes of one block on a rank that runs `layers`; 0 if it has no attention."""
        most = max(sum(layer in layers for layer in group.layers) for group in self.groups)
        return most * self.page_bytes

    def blocks_per_request(self, length: int) -> int:
        """Return how many blocks a request of `length` tokens holds at most."""
        return sum(self._blocks(group.reach, length) for group in self.groups)

    def _blocks(self, reach: Reach, length: int) -> int:
        if reach.tokens is None:
            return cdiv(length, self.block_size)
        if reach.is_chunk:
            return cdiv(min(reach.tokens + self.in_flight, length), self.block_size)
        # A window may begin in the middle of a block.
        return cdiv(min(reach.tokens - 1 + self.in_flight, length), self.block_size) + 1

    def capacity(self, num_blocks: int, length: int) -> int:
        """Return the tokens that vLLM says fit into the cache, in requests of `length` tokens."""
        return int(num_blocks / self.blocks_per_request(length) * length)

    def longest(self, num_blocks: int, limit: int) -> int:
        """Return the longest request, up to `limit` tokens, that fits; one block is vLLM's own. 0 if none does."""
        return _largest(limit, lambda n: self.blocks_per_request(n) <= num_blocks - 1)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def page_bytes(kv_heads: int, head_dim: int, tp: int, block_size: int, dtype: str) -> int:
    """Return the bytes of one block of one layer on one rank, with keys and values per head.

    Raises:
        UnsupportedError: a dtype that is not one number per element, or heads that the ranks cannot share.
    """
    heads = kv_heads // tp if kv_heads >= tp else 1
    if max(kv_heads, tp) % min(kv_heads, tp):
        raise UnsupportedError(
            f"--tp {tp}: {kv_heads} KV heads, which that many ranks cannot share evenly. "
            "Give another --tp, and --pp for the rest of the GPUs."
        )
    return block_size * heads * 2 * head_dim * _itemsize(dtype)


def latent_page_bytes(width: int, block_size: int, dtype: str) -> int:
    """Return the bytes of one block of one layer with a latent vector [width] per token, which every rank holds whole.

    Raises:
        UnsupportedError: a dtype that is not one number per element.
    """
    return block_size * width * _itemsize(dtype)


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise UnsupportedError(
            f"--kv-cache-dtype {dtype}: plan knows {', '.join(DTYPE_BYTES)}. Give one of them."
        )
    return DTYPE_BYTES[dtype]
