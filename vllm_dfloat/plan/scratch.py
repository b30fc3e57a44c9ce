"""The scratch of a rank: what layers are decoded into, and the LM head that need not be held in it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_dfloat.checkpoint.names import innermost_block
from vllm_dfloat.codec.descriptor import MAX_MEMBERS
from vllm_dfloat.codec.slabs import slab_rows
from vllm_dfloat.plan.packed_size import Packed, packed_size
from vllm_dfloat.plan.weights import Weight

DEFAULT_SLAB = 64 << 20  # bytes; `slab_bytes` of kernels/configs.py


@dataclass(frozen=True)
class Scratch:
    """Bytes for decoding.

    Attributes:
        held: the buffers of all slots.
        whole_head: an LM head that is not held; it is decoded for the time of a product where slabs are not proven.
    """

    held: int
    whole_head: int


@dataclass
class Layers:
    """The compressed weights of a rank, as far as they need scratch. All in bytes.

    Attributes:
        largest: of linear layers.
        blocks: of the linear layers of each transformer block.
        experts: of each layer of routed experts.
        head: the LM head: its rows, columns and bytes; the largest, if there are several.
    """

    largest: int = 0
    blocks: dict[str, list[int]] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    head: tuple[int, int, int] = (0, 0, 0)

    def add(self, weight: Weight, shape: tuple[int, int], packed: Packed, is_last: bool) -> None:
        """Note a compressed weight with its [rows, cols] on this rank; is_last: of the last pipeline stage."""
        size = packed.scratch_bytes
        if module := weight.expert_layer:
            self.experts[module] = self.experts.get(module, _flag_bytes(weight)) + size
        elif weight.split == "vocab":
            # Rows of an embedding are looked up without scratch.
            if is_last and weight.place != "first":
                self.head = max(self.head, (*shape, size), key=lambda head: head[2])
        else:
            self.largest = max(self.largest, size)
            if name := innermost_block(weight.name):
                self.blocks.setdefault(name, []).append(size)

    def scratch(self, by_block: bool, slots: int, slab: int | None) -> Scratch:
        """Return what these weights need.

        Args:
            by_block: whether a transformer block is decoded at once.
            slots: buffers in use at the same time. Experts and heads are decoded in the first one.
            slab: bytes of a slab of the head; None for what others need, or DEFAULT_SLAB; 0 for the whole head.
        """
        groups: Iterable[int] = ()
        if by_block:
            groups = (sum(b) for b in self.blocks.values() if 2 <= len(b) <= MAX_MEMBERS)
        others = max([self.largest, *groups])
        main = max([others, *self.experts.values()])
        rows, cols, whole = self.head
        limit = max(main, DEFAULT_SLAB) if slab is None else slab
        part = slab_rows(rows, cols, limit) if rows and slab != 0 else rows
        if whole <= main or whole <= limit or part == rows:
            return Scratch(max(main, whole) + (slots - 1) * others, 0)
        of_slab = packed_size(part, cols, 0).scratch_bytes
        return Scratch(max(main, of_slab) + (slots - 1) * others, whole)


def _flag_bytes(experts: Weight) -> int:
    """Return the bytes, in whole tiles, of a flag for each expert: an int32, which takes the room of two weights."""
    return packed_size(1, 2 * max(1, experts.num_experts), 0).scratch_bytes
