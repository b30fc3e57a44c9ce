"""Slots of the scratch: one for each of vLLM's streams that run compressed layers at the same time."""

from collections.abc import Hashable
from typing import Any

import torch

from vllm_dfloat.device.scratch import MAIN_SLOT


def slot(device: torch.device) -> Hashable:
    """Return the scratch slot of the current stream: (microbatch, on the aux stream).

    Shared experts run on `aux_stream` while the routed ones run; two microbatches overlap under --enable-dbo. The
    streams for warm-up and for graph capture never overlap, so they share a slot.
    """
    if device.type != "cuda":
        return MAIN_SLOT
    from vllm.utils.torch_utils import aux_stream
    from vllm.v1.worker import ubatching

    try:
        ubatch = int(ubatching.dbo_current_ubatch_id())
    except KeyError:  # microbatches run, but not in this thread
        ubatch = 0
    return _slot(ubatch, torch.cuda.current_stream() == aux_stream())


def _slot(ubatch: int, is_aux: bool) -> Hashable:
    return (ubatch, is_aux) if ubatch or is_aux else MAIN_SLOT


def slots(config: Any | None) -> list[Hashable]:
    """Return every value that `slot` can take with this VllmConfig."""
    model = getattr(config, "model_config", None)
    on_aux = (False, True) if getattr(model, "is_moe", False) else (False,)
    return [_slot(ubatch, aux) for ubatch in range(_num_ubatches(config)) for aux in on_aux]


def main_slots(config: Any | None) -> list[Hashable]:
    """Return every value that `slot` can take where routed experts and LM heads run: never on the aux stream."""
    return [_slot(ubatch, False) for ubatch in range(_num_ubatches(config))]


def _num_ubatches(config: Any | None) -> int:
    parallel = getattr(config, "parallel_config", None)
    overlaps = getattr(parallel, "use_ubatching", False)
    return int(getattr(parallel, "num_ubatches", 1)) if overlaps else 1
