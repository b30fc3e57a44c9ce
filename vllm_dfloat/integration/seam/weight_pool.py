"""The pool of GPU memory in which vLLM's sleep mode keeps weights, to free and restore them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def has_pool_of_weights() -> bool:
    """Return whether sleep mode is on, so that vLLM allocates weights on a GPU in a pool that it frees."""
    return _allocator_of_sleep_mode() is not None


@contextmanager
def pool_of_weights() -> Iterator[None]:
    """Allocate in the pool that sleep mode frees as weights, if there is one."""
    allocator = _allocator_of_sleep_mode()
    if allocator is None:
        yield
        return
    before = allocator.allocator_and_pools["weights"]
    if not isinstance(
        before, list
    ):  # 0.28 and 0.30 forget the older pool, which must outlive its memory
        _older_pools.append(before)
    with allocator.use_memory_pool(tag="weights"):
        yield


def _allocator_of_sleep_mode() -> Any | None:
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = getattr(getattr(module, "CuMemAllocator", None), "instance", None)
    return (
        allocator if allocator is not None and "weights" in allocator.allocator_and_pools else None
    )


_older_pools: list[Any] = []
