"""CUDA's streams, events and graphs in words of a CPU: what runs when is drawn at random, as far as waits allow.

Nothing runs when it is called. `drain` runs all that waits, an item of a random stream at a time.
"""

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

Run = Callable[[], Any]


class Stream:
    """A queue of work; `done` counts the items that have run."""

    def __init__(self, cuda: "Cuda") -> None:
        self.cuda = cuda
        self.items: list[Run] = []
        self.done = 0
        cuda.streams.append(self)

    def add(self, item: Run) -> None:
        if self.cuda.graph is not None:
            self.cuda.graph.items.append((self, item))
        else:
            self.items.append(item)

    def record_event(self, event: "Event") -> None:
        event.record(self)

    def wait_event(self, event: "Event") -> None:
        if self.cuda.graph is not event.graph:
            raise AssertionError(
                "an event of a capture is waited for outside of it, or the reverse"
            )
        if event.mark is not None:  # else it was never recorded
            self.add(Wait(event.mark))

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.cuda)
        event.record(other)
        self.wait_event(event)


class Mark:
    """An item that an event is recorded by."""

    def __init__(self) -> None:
        self.has_run = False

    def __call__(self) -> None:
        self.has_run = True


class Event:
    """A point of a stream, or of a graph."""

    def __init__(self, cuda: "Cuda") -> None:
        self.cuda = cuda
        self.graph: Graph | None = None
        self.mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        self.graph = self.cuda.graph
        self.mark = Mark()
        stream.add(self.mark)


class Wait:
    """An item that can run when an event is over, as it was recorded when this was called."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def __call__(self) -> None:
        """Do nothing."""


class Graph:
    """What was captured, in the order of the calls."""

    def __init__(self) -> None:
        self.items: list[tuple[Stream, Run]] = []


class Cuda:
    """Streams of one device.

    Attributes:
        main: the stream of the model.
        graph: the one being captured, or None.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.main = Stream(self)
        self.current = self.main
        self.graph: Graph | None = None
        copy_at_once = torch.Tensor.copy_

        def copy(
            into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
        ) -> torch.Tensor:
            if not non_blocking:
                return copy_at_once(into, source)
            self.current.add(functools.partial(copy_at_once, into, source))
            return into

        names: dict[str, Any] = {
            "Event": lambda: Event(self),
            "Stream": lambda: Stream(self),
            "current_stream": lambda: self.current,
            "stream": self._within,
            "synchronize": self.drain,
            "is_current_stream_capturing": lambda: self.graph is not None,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "copy_", copy)

    @contextmanager
    def _within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Yield a graph that gets what is called meanwhile."""
        self.graph = Graph()
        try:
            yield self.graph
        finally:
            self.graph = None

    def replay(self, graph: Graph) -> None:
        """Launch a graph on the main stream: its other streams begin there, and it ends when all have ended."""
        branches = {stream: Stream(self) for stream, _ in graph.items if stream is not self.main}
        branches[self.main] = self.main
        for stream, branch in branches.items():
            if stream is not self.main:
                branch.wait_stream(self.main)
        marks: dict[Mark, Mark] = {}
        for stream, item in graph.items:
            if isinstance(item, Mark):
                branches[stream].items.append(marks.setdefault(item, Mark()))
            elif isinstance(item, Wait):
                branches[stream].items.append(Wait(marks[item.mark]))
            else:
                branches[stream].items.append(item)
        for stream, branch in branches.items():
            if stream is not self.main:
                self.main.wait_stream(branch)

    def drain(self) -> None:
        """Run all that waits."""
        while waiting := [stream for stream in self.streams if stream.done < len(stream.items)]:
            ready = [stream for stream in waiting if _is_ready(stream.items[stream.done])]
            assert ready, "streams that wait for each other"
            stream = self.random.choice(ready)
            item = stream.items[stream.done]
            stream.done += 1
            item()


def _is_ready(item: Run) -> bool:
    return not isinstance(item, Wait) or item.mark.has_run
