"""Run jobs in processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Result = TypeVar("Result")


def run_jobs(
    call: Callable[..., Result], jobs: Sequence[tuple[object, ...]], workers: int, threads: int
) -> Iterator[Result]:
    """Yield `call(*job)` of every job as they end; in this process if one worker is wanted.

    The first exception ends everything: jobs that have not begun are given up, and running ones are waited for.

    Args:
        call: a function of a module.
        jobs: arguments, which must be picklable.
        workers: processes.
        threads: threads in each.
    """
    if workers <= 1:
        yield from (call(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by other threads
    pool = ProcessPoolExecutor(workers, context, _begin, (os.getpid(), threads))
    try:
        futures = [pool.submit(call, *job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int, threads: int) -> None:
    os.environ["VLLM_DFLOAT_THREADS"] = str(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent: nothing else tells a pool's worker that it was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def share_cores(cores: int, jobs: int, job_bytes: int, total_bytes: int, memory: int) -> int:
    """Return how many processes to start.

    Args:
        cores: that may be used.
        jobs: how many there are.
        job_bytes: memory that the largest job takes.
        total_bytes: what there is to work on in all; little of it is not worth a process.
        memory: bytes available.
    """
    wanted = min(cores, jobs, total_bytes // _BYTES_WORTH_A_PROCESS, memory // max(1, job_bytes))
    return max(1, int(wanted))


_BYTES_WORTH_A_PROCESS = (
    1 << 30
)  # a process takes a second or two to start; threads share less than this


def available_memory() -> int:
    """Return the bytes that the system says it can give to new processes, without swapping."""
    try:
        with open("/proc/meminfo") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 8 << 30
