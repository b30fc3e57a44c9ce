"""Keep the replies of several ranks to vLLM's collective_rpc in step with the calls.

vLLM's multiprocess executor stops reading replies at the first rank that fails or is late. The replies of the ranks
after it stay in their queues and are taken for replies to the next call: after one refused update, later calls would
fail although they took effect, or return the result of an earlier call. Here such replies are counted as owed, and
dropped when they arrive.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_dfloat.integration.seam import compat, workers


def install() -> None:
    """Keep replies in step in executors that are created after this call. A second call changes nothing."""
    executor = workers.executor_class()
    make = executor.__init__
    if hasattr(make, "_dfloat11_guard"):
        return

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        compat.let_numba_be_scanned()  # an engine refused before may have imported it since
        make(self, *args, **kwargs)
        queues = getattr(self, "response_mqs", None)
        if type(queues) is list:  # an executor with one process per rank
            self.response_mqs = Queues(queues)

    vars(init)["_dfloat11_guard"] = True
    executor.__init__ = init


class Queue:
    """One rank's queue of replies; the first `owed` replies belong to earlier calls and are dropped."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.owed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """Drop the owed replies and return the next one, (status, result)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.owed:
            self._queue.dequeue(timeout=timeout, **kwargs)
            self.owed -= 1
            if deadline is not None:
                timeout = max(0.0, deadline - time.monotonic())
        return self._queue.dequeue(timeout=timeout, **kwargs)


class Queues(list[Queue]):
    """The queues of all ranks. One iteration over them reads the replies to one call."""

    def __init__(self, queues: Sequence[Any]) -> None:
        super().__init__(map(Queue, queues))

    def __iter__(self) -> Iterator[Any]:
        queues = list(super().__iter__())
        owing: set[Queue] = set()
        for i, queue in enumerate(queues):
            yield _OfOneCall(queue, queues[i:], owing)


class _OfOneCall:
    """A rank's queue during one call: after a failure, the replies of the ranks after it are owed.

    A caller that reads on after a failure (vLLM 0.33 with fault tolerance) still gets them.
    """

    def __init__(self, queue: Queue, rest: Sequence[Queue], owing: set[Queue]) -> None:
        self._queue, self._rest, self._owing = queue, rest, owing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, **kwargs: Any) -> Any:
        if self._queue in self._owing:
            self._owing.remove(self._queue)
            self._queue.owed -= 1
        try:
            reply = self._queue.dequeue(**kwargs)
        except TimeoutError:
            self._owe(self._rest)
            raise
        if getattr(reply[0], "name", "") != "SUCCESS":
            self._owe(self._rest[1:])
        return reply

    def _owe(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            if queue not in self._owing:
                self._owing.add(queue)
                queue.owed += 1
