"""What the ranks that load a model together tell each other before they build it."""

from typing import Any, TypeVar

import torch

from vllm_dfloat.integration.seam import layer_kinds

Group = torch.distributed.ProcessGroup
Value = TypeVar("Value")


def that_load(config: Any, quant_config: Any) -> Group | None:
    """Return all ranks that build the model of this quantization config, as a group of the host; None for one alone.

    They are vLLM's world: with data parallelism, where engines share experts, those of all engines. A rank that fails
    before is an error here as in vLLM's own collectives, after as long a time at most.

    A draft with a config of its own is built on the last pipeline stage only, and with --enable-elastic-ep engines join
    others that have started long ago: these do not wait for ranks that will not come.

    Args:
        config: the current VllmConfig.
    """
    from vllm.distributed import parallel_state

    if config.quant_config is not quant_config or layer_kinds.is_draft(config.model_config):
        return None
    if getattr(config.parallel_config, "enable_elastic_ep", False) or not _are_there():
        return None
    world = parallel_state.get_world_group()
    return world.cpu_group if world.world_size > 1 else None


def _are_there() -> bool:
    """Return whether this process has vLLM's groups: its front end, which may ask too, has none."""
    from vllm.distributed import parallel_state

    return torch.distributed.is_initialized() and bool(
        parallel_state.model_parallel_is_initialized()
    )


def device_memory() -> int:
    """Return the bytes of the device that this rank runs models on."""
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike() or not _are_there():
        return int(current_platform.get_device_total_memory())
    return int(
        current_platform.get_device_total_memory(parallel_state.get_world_group().local_rank)
    )


def least(number: int, group: Group | None) -> int:
    """Return the least of the numbers of all ranks; each must call this."""
    if group is None:
        return number
    numbers = torch.tensor(number, dtype=torch.int64, device="cpu")  # vLLM's default is the GPU
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN, group)
    return int(numbers)


def of_first(value: Value, group: Group | None) -> Value:
    """Return the value of the first rank; each must call this."""
    if group is None:
        return value
    values = [value]
    first = torch.distributed.get_process_group_ranks(group)[0]
    with torch.device("cpu"):
        torch.distributed.broadcast_object_list(values, first, group)
    return values[0]
