"""Replies of several ranks to vLLM's collective_rpc, kept in step.

vLLM's multiprocess executor stops reading replies at the first rank that failed or came too late. What the ranks after
it say stays in their queues and is taken for the reply to the next call: after one refused update, later calls would
fail although they took effect, or tell of an earlier one. Here such replies are owed, and dropped when they come.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_dfloat.integration.seam import compat


def install() -> None:
    """Keep the replies to executors that are made from here on in step. A second call changes nothing."""
    executor = compat.executor_class()
    make = executor.__init__
    if hasattr(make, "_dfloat11_guard"):
        return

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        queues = getattr(self, "response_mqs", None)
        if type(queues) is list:  # one with a process for each rank
            self.response_mqs = Queues(queues)

    vars(init)["_dfloat11_guard"] = True
    executor.__init__ = init


class Queue:
    """One rank's queue of replies, of which the first `owed` answer calls that nobody waits for any more."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.owed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """Return (status, result) of the oldest call that is waited for."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.owed:
            self._queue.dequeue(timeout=timeout, **kwargs)
            self.owed -= 1
            if deadline is not None:
                timeout = max(0.0, deadline - time.monotonic())
        return self._queue.dequeue(timeout=timeout, **kwargs)


class Queues(list[Queue]):
    """The queues of all ranks. Iterating over them is reading the replies to one call."""

    def __init__(self, queues: Sequence[Any]) -> None:
        super().__init__(map(Queue, queues))

    def __iter__(self) -> Iterator[Any]:
        queues = list(super().__iter__())
        owing: set[Queue] = set()
        for i, queue in enumerate(queues):
            yield _OfOneCall(queue, queues[i:], owing)


class _OfOneCall:
    """A rank's queue while the reply to one call is read; after a failure the replies of the ranks after it are owed.

    Whoever reads on after a failure (vLLM 0.33 with fault tolerance) gets them.
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
