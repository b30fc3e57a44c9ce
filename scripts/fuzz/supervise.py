"""Run numbered cases in child processes that may die or hang; only the case that did it is lost."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Report = dict[str, Any]


@dataclass
class _Child:
    """A child process, and its place among its cases.

    Attributes:
        cases: the cases not yet begun.
        current: the running case.
        since: the start of the running case, by the parent's clock.
    """

    pid: int
    pipe: int
    cases: list[int]
    current: int | None = None
    since: float = field(default_factory=time.monotonic)
    buffer: bytes = b""


def supervise(
    run: Callable[[int, int], Report], cases: Sequence[int], workers: int, wall_seconds: float
) -> Iterator[Report]:
    """Yield `run(case, worker)` of every case when it ends; {"number", "result": "wrong", "told"} for a case that
    killed its process or did not end.

    Args:
        run: called in a fork of this process, which must have only one thread.
        cases: the numbers of the cases.
        workers: number of processes at the same time.
        wall_seconds: wall-clock limit per case, after which its process is killed. It is for cases that wait; CPU time
            is limited elsewhere.
    """
    children = {w: _start(run, list(cases[w::workers]), w) for w in range(workers)}
    try:
        while children:
            ready, _, _ = select.select([child.pipe for child in children.values()], [], [], 0.2)
            for worker, child in list(children.items()):
                ended = child.pipe in ready and not (yield from _reports(child))
                late = child.current is not None and time.monotonic() - child.since > wall_seconds
                if late and not ended:
                    os.kill(child.pid, signal.SIGKILL)
                if not (ended or late):
                    continue
                status = _reap(child)
                del children[worker]
                if child.current is not None:
                    yield _death(child.current, status, late, wall_seconds)
                if child.cases and (child.current is not None or status):
                    children[worker] = _start(run, child.cases, worker)
    finally:
        for child in children.values():
            os.kill(child.pid, signal.SIGKILL)
            _reap(child)


def _start(run: Callable[[int, int], Report], cases: list[int], worker: int) -> _Child:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for case in cases:
                _send(writer, {"begin": case})
                _send(writer, run(case, worker))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    return _Child(pid, reader, list(cases))


def _send(pipe: int, content: Report) -> None:
    line = json.dumps(content).encode() + b"\n"
    while line:
        line = line[os.write(pipe, line) :]


def _reports(child: _Child) -> Iterator[Report]:
    """Yield the reports that a child has sent; return whether it may send more."""
    data = os.read(child.pipe, 1 << 20)
    child.buffer += data
    *lines, child.buffer = child.buffer.split(b"\n")
    for line in lines:
        content = json.loads(line)
        if "begin" in content:
            child.current, child.since = content["begin"], time.monotonic()
            child.cases.remove(child.current)
        else:
            child.current = None
            yield content
    return bool(data)


def _reap(child: _Child) -> int:
    os.close(child.pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def _death(case: int, status: int, late: bool, wall_seconds: float) -> Report:
    told = f"did not end in {wall_seconds} s" if late else f"its process ended with {status}"
    return {"number": case, "result": "wrong", "told": told, "kinds": [], "base": ""}
