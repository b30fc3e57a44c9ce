"""A transformer block whose payloads lie in host memory and are copied to buffers of the device ahead of use.

vLLM's prefetching offload has a ring of slots, each with one buffer per name of a parameter, and blocks that take turns
in a slot. Copies, streams and events are vLLM's. Here a copy moves the bytes of a payload, and the descriptor tells of
the buffer, so no kernel sees a difference.

A block that found another's bytes in its buffer would compute with wrong weights. So the descriptors of all blocks of a
slot lie side by side. Before a payload is copied, all of them become NOWHERE, which every reader refuses; after it,
those of the block itself become right. Both are copies on the same stream, and captured with the payload's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.offloader import prefetch

from vllm_dfloat.device.host_arena import HostMemory
from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.integration.seam import layer_kinds
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.places import PLACE, Give, Place

if TYPE_CHECKING:
    from vllm_dfloat.integration.seam.prefetcher import PackedPrefetcher

SPARE = 256  # room for payloads that grow in an update: one part of so many
ALIGNMENT = 16


class Copy:
    """Bytes that vLLM copies from the host when it is the block's turn; vLLM knows it as a parameter.

    Attributes:
        _cpu_storage, _gpu_buffer: from where to where; the names are vLLM's. A captured graph keeps addresses and size.
        offloaded_bytes: for vLLM's log.
    """

    def __init__(self, host: torch.Tensor, device: torch.Tensor, offloaded_bytes: int = 0) -> None:
        self._cpu_storage, self._gpu_buffer = host, device
        self.offloaded_bytes = offloaded_bytes

    def post_init(self) -> None:
        """Do nothing; vLLM calls it."""


@dataclass
class Stage:
    """One compressed parameter of a block.

    Attributes:
        row: of its descriptor, among those of the block.
        memory: its place on the host, as large as its first payload and a bit; None while it has none.
        buffer: of the device, as large; None until vLLM has allocated its buffers.
        weight, give: what the layer holds, and how to replace it.
    """

    row: int = -1
    memory: HostMemory | None = None
    buffer: torch.Tensor | None = None
    weight: PackedWeight | None = None
    give: Give = field(default=lambda packed: None)

    @property
    def room(self) -> int:
        """Bytes for the payload."""
        return 0 if self.memory is None else self.memory.host.numel()


class StagedModule(prefetch._ModuleOffloader):  # type: ignore[misc]  # vLLM is untyped
    """Takes the place of what vLLM makes for a block, for its compressed parameters; all else stays on the device.

    Attributes:
        stages: the compressed parameters, by their path in the block.
        slot: its number in the ring.
    """

    def __init__(self, offloader: "PackedPrefetcher", names: Sequence[str], **given: Any) -> None:
        """Note the compressed ones among the parameters `names` that vLLM chose; given: vLLM's other arguments."""
        self.offloader = offloader
        if offloader.on_gpu:
            super().__init__(whitelist_param_names=[], **given)
        else:  # no streams, no events
            self.module, self.layer_idx = given["module"], given["layer_idx"]
            self.offloaded_bytes, self._prefetch_in_capture = 0, False
            self._param_offloaders: dict[str, Copy] = {}
        self.device = offloader.device
        self.slot = self.layer_idx % offloader.prefetch_step
        self.stages: dict[str, Stage] = {}
        self.bf16_bytes = 0
        for path in names:
            self._note(path)

    def _note(self, path: str) -> None:
        owner, _, name = path.rpartition(".")
        layer = self.module.get_submodule(owner)
        parameter = layer.get_parameter(name)
        if not parameter.is_meta or layer_kinds.is_vocabulary(layer):
            return
        place = layer.__dict__.setdefault(PLACE, Place(self, owner))
        if (
            place.keeper is not self
        ):  # a layer of two blocks stays on the device: it has no turn of its own
            for other in place.names:
                del place.keeper.stages[_key(place, other)]
            place.names.clear()
        else:
            place.names.add(name)
            self.stages[path] = Stage()
            self.bf16_bytes += 2 * parameter.numel()

    def take_rows(self, table: torch.Tensor, nowhere: torch.Tensor) -> None:
        """Take the block's descriptors among those of its slot.

        Args:
            table: int64 [n, DESC_LENGTH] on the device; the block's are the next rows that are not taken.
            nowhere: the same on the host, NOWHERE in every row.
        """
        first = self.offloader.rows_taken[self.slot]
        self.offloader.rows_taken[self.slot] += len(self.stages)
        for row, stage in enumerate(self.stages.values()):
            stage.row = row
        self.descs = table[first : first + len(self.stages)]
        self.words = self.offloader.on_host(len(self.stages))
        self._revoke = Copy(nowhere, table)

    # As a Keeper of payloads.

    def take(self, place: Place, name: str, packed: PackedWeight) -> PackedWeight:
        """Return a weight with its payload in host memory; unchanged if it has none, or is larger than its place."""
        stage, size = self.stages[_key(place, name)], packed.payload.numel()
        if not size:
            return packed
        if stage.memory is None:
            room = -(size + size // SPARE) // ALIGNMENT * -ALIGNMENT
            stage.memory = self.offloader.arena.allocate(room, packed.name)
        elif size > stage.room:
            if place.held.get(name):
                logger.warning(
                    "dfloat11: %s grew to %d bytes, more than the %d of its place in host memory; it is on the device "
                    "now",
                    packed.name,
                    size,
                    stage.room,
                )
            place.held[name] = 0
            return packed
        self.offloader.wait_for_copies()
        stage.memory.host[:size].copy_(packed.payload)
        place.held[name] = size
        return _held(packed, stage).described_in(self.descs[stage.row])

    def settle(self, place: Place, name: str, packed: PackedWeight, give: Give) -> None:
        """Note a layer's weight; if it is the block's turn, copy it."""
        stage = self.stages[_key(place, name)]
        self.offloader.wait_for_copies()
        if self.offloader.has_buffers and stage.memory is not None and packed.staged is None:
            # It has outgrown its place, and is read where it is; but its descriptor still takes turns.
            packed = replace(packed, staged=packed.payload).described_in(packed.desc)
            give(packed)
        stage.weight, stage.give = packed, give
        self.words[stage.row] = torch.tensor(packed.words)
        if self.offloader.has_buffers and stage.memory is not None:
            self.descs[stage.row].zero_()
            if self.offloader.is_in_its_slot(self):
                self.start_onload_to_static()

    # As vLLM's object for a block.

    def sync_cpu_storage(self) -> None:
        """Do nothing: payloads lie where they are to be."""

    def get_param_infos(self) -> list[prefetch.ParamInfo]:
        """Return what vLLM allocates in each slot: for each name, as much as the largest payload of that name."""
        return [self._info(path) for path, stage in self.stages.items() if stage.memory]

    def _info(self, path: str) -> prefetch.ParamInfo:
        return prefetch.ParamInfo(path, (self.offloader.largest(path),), (1,), torch.uint8)

    def assign_buffer_slot(self, pool: prefetch.StaticBufferPool, slot_idx: int) -> None:
        """Let the descriptors tell of the slot's buffers, and prepare the copies."""
        self._buffer_pool = pool
        self._param_offloaders = {"revoke": self._revoke}
        for path, stage in self.stages.items():
            if stage.memory is None or stage.weight is None:
                continue
            info = self._info(path)
            whole = pool.get_buffer(path, info.shape, info.stride, info.dtype, slot_idx)
            stage.buffer = whole[: stage.room]
            stage.weight = _held(stage.weight, stage).described_in(self.descs[stage.row])
            self.words[stage.row] = torch.tensor(stage.weight.words)
            stage.give(stage.weight)
            size = stage.weight.payload.numel()
            self._param_offloaders[path] = Copy(stage.memory.host, stage.buffer, size)
        self.descs.zero_()
        self._param_offloaders["grant"] = Copy(self.words, self.descs)

    def start_onload_to_static(self) -> None:
        """Copy the payloads: on a GPU as vLLM does, on its stream; on a CPU at once."""
        self.offloader.note_turn(self)
        if self.offloader.on_gpu:
            super().start_onload_to_static()
            return
        for copy in self._param_offloaders.values():
            copy._gpu_buffer.copy_(copy._cpu_storage)


def _key(place: Place, name: str) -> str:
    return f"{place.path}.{name}" if place.path else name


def _held(packed: PackedWeight, stage: Stage) -> PackedWeight:
    """Return a weight with its payload in a stage's memory on the host, read in its buffer as soon as it has one."""
    assert stage.memory is not None
    size = packed.payload.numel()
    staged = None if stage.buffer is None else stage.buffer[:size]
    return replace(packed, payload=stage.memory.shown[:size], staged=staged, room=None)
