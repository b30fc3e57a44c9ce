"""The scratch arena: one BF16 buffer per device into which layers are decoded, one after the other.

A layer's weights are valid until the next layer decodes. That is long enough: the layer's GEMM is the next work on the
same stream. Work on a side stream would overwrite them, so each stream that runs at the same time has its own buffer,
a slot.
"""

from collections.abc import Hashable, Iterable

import torch

from vllm_dfloat.codec.layout import TILE_WEIGHTS
from vllm_dfloat.errors import DeviceError

MAIN_SLOT = 0
ALL_SLOTS = "all"

Buffers = tuple[torch.Tensor, torch.Tensor]


class ScratchArena:
    """Buffers that every compressed layer of a process shares, one per device and slot."""

    def __init__(self) -> None:
        self._needed: dict[tuple[torch.device, Hashable], int] = {}
        self._buffers: dict[tuple[torch.device, Hashable], Buffers] = {}
        self._groups: dict[tuple[torch.device, Hashable], tuple[Hashable, set[int]]] = {}

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
        key = device, slot
        self._groups.pop(key, None)
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
        group: Hashable,
        member: int,
        slot: Hashable = MAIN_SLOT,
    ) -> tuple[Buffers, bool]:
        """Return a slot's buffer for a group of matrices, and whether the group must be decoded into it first.

        Decode if another group is held, the buffer is new, or `member` was already used. The last case means a new
        forward pass, and weights may have changed since the previous one. Every pass calls the layers in the same
        order, so a decision made while a CUDA graph is captured is right when the graph is replayed.

        Args:
            device, slot: as for `take`.
            numel: BF16 elements of the whole group, whole tiles.
            group: a key that differs between groups.
            member: the matrix wanted, a number that differs within the group.
        """
        key = device, slot
        held, used = self._groups.get(key, (None, set()))
        before = self._buffers.get(key)
        buffers = self.take(device, numel, slot)
        is_stale = held != group or member in used or buffers is not before
        self._groups[key] = group, {member} if is_stale else used | {member}
        return buffers, is_stale

    def release(self) -> None:
        """Drop all buffers and noted sizes, for example when an engine shuts down and its process goes on."""
        self._buffers.clear()
        self._groups.clear()
        self._needed.clear()


scratch = ScratchArena()
