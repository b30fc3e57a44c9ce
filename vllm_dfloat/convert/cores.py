"""Run jobs in as many processes as cores and memory allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vllm_dfloat.codec.threads import num_threads
from vllm_dfloat.convert.worker_pool import Result, run_jobs

WORKER_BYTES = 400 << 20  # a process with its libraries, buffers and mapped pages; measured: 290 MB
_BYTES_WORTH_A_PROCESS = 1 << 30  # a process takes a second or two to start; threads share less


def run_on_cores(
    call: Callable[..., Result],
    jobs: Sequence[tuple[object, ...]],
    workers: int | None,
    job_bytes: int,
    total_bytes: int,
    advance: Callable[[int], None],
    held: object = None,
) -> Iterator[Result]:
    """Do as `run_jobs` with all cores.

    Args:
        call, jobs, advance, held: as for `run_jobs`.
        workers: processes; None for as many as cores and memory allow.
        job_bytes, total_bytes: as for `share_cores`.
    """
    cores = num_threads()
    if workers is None:
        memory = int(0.8 * available_memory())
        workers = share_cores(cores, len(jobs), job_bytes, total_bytes, memory)
    return run_jobs(call, jobs, workers, max(1, cores // workers), advance, held)


def share_cores(cores: int, jobs: int, job_bytes: int, total_bytes: int, memory: int) -> int:
    """Return how many processes to start.

    Args:
        cores: number of cores to use.
        jobs: number of jobs.
        job_bytes: memory of the largest job.
        total_bytes: size of all work; a process is not worth it for little.
        memory: bytes available.
    """
    wanted = min(cores, jobs, total_bytes // _BYTES_WORTH_A_PROCESS, memory // max(1, job_bytes))
    return max(1, int(wanted))


def available_memory() -> int:
    """Return the bytes that new processes can have without swapping, as the system says."""
    try:
        with open("/proc/meminfo") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 8 << 30
