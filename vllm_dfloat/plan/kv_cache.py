"""How many tokens fit a KV cache of some bytes: vLLM's groups of layers, KV blocks and capacity.

All groups of layers take KV blocks from one pool. Layers with and without a window, and those with a state, are in
different groups, with about the same number of layers each and pages of one size, so that all KV blocks have the same
size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
class Pages:
    """The cache of one layer on a rank.

    Attributes:
        layer: number of its transformer block.
        page_bytes: of one KV block of this layer.
        block_size: tokens per KV block; of a layer with a state, those of the model's other layers.
        reach: of its attention.
        states: KV blocks per request if the layer has a state, whatever the request's length; else 0.
    """

    layer: int
    page_bytes: int
    block_size: int
    reach: Reach = EVERYTHING
    states: int = 0


@dataclass(frozen=True)
class Group:
    """Layers that share a table of KV blocks."""

    pages: tuple[Pages, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(pages.layer for pages in self.pages)

    def blocks(self, length: int, in_flight: int) -> int:
        """Return how many KV blocks a request of `length` tokens holds at most."""
        first = self.pages[0]
        if first.states:
            return first.states
        if first.reach.tokens is None:
            return cdiv(length, first.block_size)
        if first.reach.is_chunk:
            return cdiv(min(first.reach.tokens + in_flight, length), first.block_size)
        # A window may begin in the middle of a block.
        return cdiv(min(first.reach.tokens - 1 + in_flight, length), first.block_size) + 1


def group_layers(caches: Sequence[Pages]) -> tuple[Group, ...]:
    """Return vLLM's groups of layers.

    Args:
        caches: of the model's layers, in order.
    """
    if len({(one.reach, one.block_size, one.states) for one in caches}) == 1:
        return (Group(tuple(caches)),)  # these need the same blocks, whatever their pages
    kinds: dict[Pages, list[Pages]] = {}
    for one in _with_equal_pages(caches):
        kinds.setdefault(replace(one, layer=-1), []).append(one)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for layers in kinds.values():
        step = cdiv(len(layers), size)
        groups += [Group(tuple(layers[i::step])) for i in range(step)]
    return tuple(groups)


def _with_equal_pages(caches: Sequence[Pages]) -> list[Pages]:
    """Return caches whose pages are as large as the largest: of more tokens where these fill it, else padded."""
    largest = max(one.page_bytes for one in caches)
    equal = []
    for one in caches:
        ratio, rest = divmod(largest, one.page_bytes)
        longer = one.block_size if rest or one.states else one.block_size * ratio
        equal.append(replace(one, page_bytes=largest, block_size=longer))
    return equal


@dataclass(frozen=True)
class KVCache:
    """The shape of the cache on one rank, and its capacity.

    Attributes:
        groups: of the whole model.
        in_flight: tokens that may be scheduled before others are freed: batches at once times tokens per batch.
    """

    groups: tuple[Group, ...]
    in_flight: int

    def block_bytes(self, layers: range) -> int:
        """Return the bytes of one block on a rank that runs `layers`; 0 if it caches nothing."""
        return max(
            sum(one.page_bytes for one in group.pages if one.layer in layers)
            for group in self.groups
        )

    def bytes_per_token(self, layers: range) -> float:
        """Return the bytes of a token on a rank that runs `layers`; those with a window count in full, states not."""
        pages = [one for group in self.groups for one in group.pages if one.layer in layers]
        return sum(one.page_bytes / one.block_size for one in pages if not one.states)

    def blocks_per_request(self, length: int) -> int:
        """Return how many blocks a request of `length` tokens holds at most."""
        return sum(group.blocks(length, self.in_flight) for group in self.groups)

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


def page_bytes(kv_heads: int, width: int, tp: int, block_size: int, dtype: str) -> int:
    """Return the bytes of one block of one layer on one rank; a key and a value of a head have `width` numbers.

    Raises:
        UnsupportedError: a dtype that is not one number per element, or heads that the ranks cannot share.
    """
    heads = kv_heads // tp if kv_heads >= tp else 1
    if max(kv_heads, tp) % min(kv_heads, tp):
        raise UnsupportedError(
            f"--tp {tp}: {kv_heads} KV heads, which that many ranks cannot share evenly. "
            "Give another --tp, and --pp for the rest of the GPUs."
        )
    return block_size * heads * width * _itemsize(dtype)


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
