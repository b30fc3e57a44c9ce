"""Where an update's payload goes on a GPU: into the memory of the payload before it.

Sleep mode frees what lies in vLLM's pool for weights. Payloads are made there while the model is loaded; one that an
update put elsewhere would stay on a sleeping GPU, and its old place in the pool would be of no use to anything else.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch

from vllm_dfloat.device.packed_weight import PackedWeight
from vllm_dfloat.integration.seam import weight_pool

SPARE = 256  # rooms are larger than payloads by one part of so many: the next payload may be larger


def is_kept(device: torch.device) -> bool:
    """Return whether payloads keep their room; on a CPU an update keeps the old payload by reference, to undo."""
    return device.type == "cuda"


def in_room(packed: PackedWeight, before: PackedWeight | None) -> PackedWeight:
    """Return a weight with its payload in the room of the weight that the layer had before.

    Without sleep mode, the first payload of a layer is its room. A payload that is larger than the room gets a new one.
    """
    if not is_kept(packed.payload.device):
        return packed
    has_pool = weight_pool.has_pool_of_weights()
    room = before.room if before is not None else None if has_pool else packed.payload
    size = packed.payload.numel()
    if room is None or room.numel() < size:
        # While a model is loaded, vLLM itself allocates in the pool.
        with nullcontext() if before is None else weight_pool.pool_of_weights():
            spare = size // SPARE if has_pool else 0
            room = torch.empty(size + spare, dtype=torch.uint8, device=packed.payload.device)
    payload = room[:size]
    if payload.data_ptr() == packed.payload.data_ptr():
        return replace(packed, room=room)
    payload.copy_(packed.payload)
    return replace(packed, payload=payload, room=room).described_in(packed.desc)
