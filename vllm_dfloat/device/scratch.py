"""The scratch arena: one BF16 buffer per device into which layers are decoded, one after the other.

A layer's weights are valid until the next layer decodes. That is long enough: the layer's GEMM is the next work on the
same stream. Work on a side stream would overwrite them, so each stream that runs at the same time has its own buffer,
a slot.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import torch

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.errors import DeviceError

MAIN_SLOT = 0
ALL_SLOTS = "all"

Buffers = tuple[torch.Tensor, torch.Tensor]


@dataclass
class _Pass:
    """What a forward pass has done with a block of matrices that are decoded together.

    Attributes:
        block: its key.
        called: the matrices that were used.
        decoded: the groups that the buffer holds.
    """

    block: Hashable
    called: set[int] = field(default_factory=set)
    decoded: set[int] = field(default_factory=set)


class ScratchArena:
    """Buffers that every compressed layer of a process shares, one per device and slot."""

    def __init__(self) -> None:
        self._needed: dict[tuple[torch.device, Hashable], int] = {}
        self._buffers: dict[tuple[torch.device, Hashable], Buffers] = {}
        self._passes: dict[tuple[torch.device, Hashable], _Pass] = {}

    def require(
        self, device: torch.device, numel: int, slots: Iterable[Hashable] = (ALL_SLOTS,)
    ) -> None:
        """Note that layers of up to `numel` weights (whole tiles) will be decoded; allocates nothing.

        Args:
            slots: where; a layer of experts, which is far larger than others, is never decoded on the aux stream.
        """
        for slot in slots:
            self._needed[device, slot] = max(self._needed.get((device, slot), 0), numel)

    def needed(self, device: torch.device, slot: Hashable) -> int:
        """Return the size of the largest layer noted for a slot."""
        return max(self._needed.get((device, at), 0) for at in (ALL_SLOTS, slot))

    def reserve(self, device: torch.device, slots: Iterable[Hashable] = (MAIN_SLOT,)) -> None:
        """Allocate the buffers of these slots for the largest layer noted."""
        for slot in slots:
            self.take(device, self.needed(device, slot), slot)

    def numel(self, device: torch.device, slot: Hashable) -> int:
        """Return the elements of a slot's buffer; 0 if it has none."""
        held = self._buffers.get((device, slot))
        return 0 if held is None else held[0].numel()

    def num_bytes(self, device: torch.device) -> int:
        """Return the bytes that the buffers of all slots on `device` take now."""
        held = [buffers for (at, _), buffers in self._buffers.items() if at == device]
        return sum(out.nbytes + status.nbytes for out, status in held)

    def take(self, device: torch.device, numel: int, slot: Hashable = MAIN_SLOT) -> Buffers:
        """Return a slot's buffer and its status words.

        Args:
            device: where the layer lies.
            numel: BF16 elements needed, whole tiles.
            slot: key of the stream that asks; streams that never run at the same time share a slot.

        Returns:
            BF16 [>= numel] and int32 [>= numel / 2048]; they still hold the last layer decoded.

        Raises:
            DeviceError: the buffer would have to grow while a CUDA graph is captured.
        """
        if now := self._passes.get((device, slot)):
            now.decoded.clear()
        return self._take(device, numel, slot)

    def _take(self, device: torch.device, numel: int, slot: Hashable) -> Buffers:
        key = device, slot
        held = self._buffers.get(key)
        if held is not None and held[0].numel() >= numel:
            return held
        if device.type == "cuda" and held is not None and torch.cuda.is_current_stream_capturing():
            raise DeviceError(
                f"{device}: a layer of {numel} weights during CUDA graph capture; the scratch holds "
                f"{held[0].numel()}. Reserve it before capture."
            )
        numel = max(numel, self.needed(device, slot))
        self._buffers.pop(key, None)  # free the old buffer before allocating the new one
        del held
        out = torch.empty(numel, dtype=torch.bfloat16, device=device)
        status = torch.zeros(numel // TILE_WEIGHTS, dtype=torch.int32, device=device)
        self._buffers[key] = out, status
        return out, status

    def take_for_group(
        self,
        device: torch.device,
        numel: int,
        block: Hashable,
        member: int,
        slot: Hashable = MAIN_SLOT,
        group: int = 0,
    ) -> tuple[Buffers, bool]:
        """Return a slot's buffer for a block of matrices, and whether a group of them must be decoded into it first.

        The groups of a block lie beside each other in the buffer. Decode if the group is not held, the buffer is new,
        or `member` was already called. The last case means a new forward pass, and weights may have changed since the
        previous one. Every pass calls the layers in the same order, so a decision made while a CUDA graph is captured
        is right when the graph is replayed.

        Args:
            device, slot: as for `take`.
            numel: BF16 elements of the whole block, whole tiles.
            block: a key that differs between blocks.
            member: the matrix wanted, a number that differs within the block.
            group: a number for the matrices that are decoded together with it.
        """
        key = device, slot
        before = self._buffers.get(key)
        buffers = self._take(device, numel, slot)
        now = self._pass(key, block, member)
        if buffers is not before:
            now.decoded.clear()
        is_stale = group not in now.decoded
        now.decoded.add(group)
        return buffers, is_stale

    def note_call(
        self, device: torch.device, block: Hashable, member: int, slot: Hashable = MAIN_SLOT
    ) -> None:
        """Note that a matrix of a block was used without being decoded: the next pass begins with it, too."""
        self._pass((device, slot), block, member)

    def _pass(self, key: tuple[torch.device, Hashable], block: Hashable, member: int) -> _Pass:
        """Return the pass that a call of a matrix belongs to, with the call noted."""
        now = self._passes.get(key)
        if now is None or now.block != block or member in now.called:
            now = self._passes[key] = _Pass(block)
        now.called.add(member)
        return now

    def release(self) -> None:
        """Drop all buffers and noted sizes, for example when an engine shuts down and its process goes on."""
        self._buffers.clear()
        self._passes.clear()
        self._needed.clear()


scratch = ScratchArena()
