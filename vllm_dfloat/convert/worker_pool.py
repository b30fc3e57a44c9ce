"""Run jobs in processes that end with their parent, however it ends, or in threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from vllm_dfloat.codec.compiling import telling, told
from vllm_dfloat.errors import DFloatError

Result = TypeVar("Result")
_SECONDS_BETWEEN_REPORTS = 0.2


class Stopped(Exception):
    """Raised in a job that was given up."""


def run_jobs(
    call: Callable[..., Result],
    jobs: Sequence[tuple[object, ...]],
    workers: int,
    threads: int,
    advance: Callable[[int], None],
    held: object = None,
) -> Iterator[Result]:
    """Yield `call(*job, report)` of every job in the order in which they end; in this process for one worker.

    The first exception, or an interruption by the user, ends everything: jobs that have not started are given up, and
    running ones end with `Stopped` at their next report.

    Raises:
        DFloatError: a process was killed.

    Args:
        call: a function of a module; it reports progress by calling its last argument with a number.
        jobs: the other arguments, which must be picklable.
        workers: processes.
        threads: threads in each.
        advance: called, in this process, with the numbers that were reported.
        held: an object that every process keeps as long as it lives, such as a `FolderLock`.
    """
    if workers <= 1:
        yield from (call(*job, advance) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by other threads
    done, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
    compiles = context.Value("b", 0, lock=False)

    def look() -> int:
        if compiles.value:
            told()
        return int(done.value)

    arguments = (os.getpid(), threads, done, stop, compiles, held)
    pool = ProcessPoolExecutor(workers, context, _begin, arguments)
    processes: list[BaseProcess] = []
    try:
        with _uninterrupted():
            futures = [pool.submit(_call, call, job) for job in jobs]
            processes += multiprocessing.active_children()
        yield from _results(futures, look, advance)
    except BrokenProcessPool as error:
        pool.shutdown(wait=True, cancel_futures=True)  # then all processes have exit codes
        raise DFloatError(_killed(processes)) from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def _killed(processes: Iterable[BaseProcess]) -> str:
    """Return a sentence about processes that have ended, one of them before its work was done."""
    codes = {process.exitcode or 0 for process in processes}
    # A broken pool ends its other processes with SIGTERM.
    names = [_ending(code) for code in sorted(codes - {0, -signal.SIGTERM})] or ["SIGTERM"]
    likely = ", as the system does when memory runs out" if names[0] == "SIGKILL" else ""
    return (
        f"a worker process was ended by {names[0]}{likely}; expected it to end with its work. What is finished stays: "
        "run the same command again, with fewer --workers if it is short of memory."
    )


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"itself, with status {code}"


def run_in_threads(
    call: Callable[..., Result],
    jobs: Sequence[tuple[object, ...]],
    threads: int,
    advance: Callable[[int], None],
) -> Iterator[Result]:
    """Do as `run_jobs` in threads of this process: for jobs that wait for a GPU, or do not need the GIL."""
    if threads <= 1:
        yield from (call(*job, advance) for job in jobs)
        return
    lock, stop, done = threading.Lock(), threading.Event(), 0

    def report(amount: int) -> None:
        nonlocal done
        if stop.is_set():
            raise Stopped
        with lock:
            done += amount

    pool = ThreadPoolExecutor(threads, "dfloat11-job")
    try:
        futures = [pool.submit(call, *job, report) for job in jobs]
        yield from _results(futures, lambda: done, advance)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _results(
    futures: Sequence[Future[Result]], done: Callable[[], int], advance: Callable[[int], None]
) -> Iterator[Result]:
    """Yield results as they come, and report the growth of `done` meanwhile."""
    waiting, seen = set(futures), 0
    while waiting:
        finished, waiting = wait(waiting, _SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
        now = done()
        advance(now - seen)
        seen = now
        yield from (future.result() for future in finished)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Start processes that ignore ctrl-C, which the terminal sends to them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_telling = ExitStack()  # closed with the worker
_shared: tuple[Any, ...] | None = None  # in a worker: done, stop and held of `run_jobs`


def _begin(parent: int, threads: int, done: Any, stop: Any, compiles: Any, held: object) -> None:
    global _shared
    _shared = done, stop, held
    _telling.enter_context(telling(lambda: setattr(compiles, "value", 1)))
    os.environ["VLLM_DFLOAT_THREADS"] = str(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _call(call: Callable[..., Result], job: tuple[object, ...]) -> Result:
    return call(*job, _report)


def _report(amount: int) -> None:
    if _shared is None:
        raise RuntimeError("not in a worker")
    done, stop, _ = _shared
    if stop.value:
        raise Stopped
    with done.get_lock():
        done.value += amount


def _end_with(parent: int) -> None:
    """End this process soon after its parent: nothing else tells a worker that its parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
