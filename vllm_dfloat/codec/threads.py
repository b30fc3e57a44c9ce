"""Run a numba kernel over ranges of tiles on all cores the process may use.

Numba's own `parallel=True` is not used: its default threading layer aborts the process when two Python threads enter
it at once, as vLLM's do. The kernels release the GIL, so plain threads scale.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from vllm_dfloat.errors import UnsupportedError

MIN_TILES_PER_THREAD = 64  # 128 Ki weights, half a millisecond: a thread with fewer does not pay


@lru_cache(maxsize=2)
def _pool(pid: int, num_threads: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(num_threads, thread_name_prefix="dfloat11")


def num_threads() -> int:
    """Return how many cores the process may use, or what VLLM_DFLOAT_THREADS says.

    Raises:
        UnsupportedError: the variable holds no number of threads.
    """
    wanted = os.environ.get("VLLM_DFLOAT_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0))
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    raise UnsupportedError(
        f"VLLM_DFLOAT_THREADS={wanted}: expected a number of threads, 1 or more. Unset it to use all cores."
    )


def over_tiles(kernel: Callable[..., Any], num_tiles: int, *args: Any) -> list[Any]:
    """Call `kernel(first, last, *args)` for ranges that cover 0..num_tiles; return what each call returned."""
    threads = min(num_threads(), num_tiles // MIN_TILES_PER_THREAD)
    if threads <= 1:
        return [kernel(0, num_tiles, *args)]
    bounds = [num_tiles * i // threads for i in range(threads + 1)]
    pool = _pool(os.getpid(), threads)
    calls = [pool.submit(kernel, bounds[i], bounds[i + 1], *args) for i in range(threads)]
    return [call.result() for call in calls]
