"""Replies of ranks in separate processes: each call of vLLM's collective_rpc gets its own replies."""

import queue
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_dfloat.integration.updating import replies
from vllm_dfloat.integration.updating.replies import Queues

NUM_RANKS = 3
SUCCESS, FAILURE = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE


class Replies(queue.SimpleQueue[Any]):
    """Replaces vLLM's MessageQueue: a dozen of vLLM 0.28's in one process deadlock in ZeroMQ."""

    def dequeue(self, timeout: float | None = None) -> Any:
        try:
            return self.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None


class Ranks:
    """vLLM's executor without workers, and the queues to which workers would write."""

    def __init__(self) -> None:
        self.queues = [Replies() for _ in range(NUM_RANKS)]
        self.executor: Any = object.__new__(MultiprocExecutor)
        self.executor.is_failed = False
        self.executor.rpc_broadcast_mq = SimpleNamespace(enqueue=lambda call: None)
        self.executor.futures_queue = deque()
        self.executor.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(enable_fault_tolerance=False)
        )
        self.executor.response_mqs = Queues(self.queues)

    def reply(
        self, call: str, failing: tuple[int, ...] = (), ranks: Any = range(NUM_RANKS)
    ) -> None:
        for rank in ranks:
            status = FAILURE if rank in failing else SUCCESS
            self.queues[rank].put((status, f"{call} of {rank}"))

    def call(self, **settings: Any) -> Any:
        return self.executor.collective_rpc("method", **settings)


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def all_of(call: str) -> list[str]:
    return [f"{call} of {rank}" for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (0, 1, 2)])
def test_call_after_one_that_failed_gets_its_own_replies(
    ranks: Ranks, failing: tuple[int, ...]
) -> None:
    # Bug caught: the replies of the ranks after the failing one were taken for replies to the next call.
    ranks.reply("first", failing)
    with pytest.raises(RuntimeError, match=f"first of {failing[0]}"):
        ranks.call()
    ranks.reply("second", failing)
    with pytest.raises(RuntimeError, match=f"second of {failing[0]}"):
        ranks.call()
    ranks.reply("third")
    assert ranks.call() == all_of("third")


def test_call_of_one_rank_after_one_that_failed_gets_that_ranks_reply(ranks: Ranks) -> None:
    # Bug caught: with pipeline stages, a forward pass got the reply to a refused update.
    ranks.reply("update", failing=(0,))
    with pytest.raises(RuntimeError, match="update of 0"):
        ranks.call()
    ranks.reply("pass", ranks=[2])
    assert ranks.call(unique_reply_rank=2) == "pass of 2"
    ranks.reply("next")
    assert ranks.call() == all_of("next")


def test_reply_that_came_too_late_is_no_reply_to_the_next_call(ranks: Ranks) -> None:
    ranks.reply("late", ranks=[0])
    with pytest.raises(TimeoutError):
        ranks.call(timeout=0.01)
    ranks.reply("late", ranks=[1, 2])
    ranks.reply("next")
    assert ranks.call() == all_of("next")


def test_failure_of_one_rank_is_told_before_the_others_have_replied(ranks: Ranks) -> None:
    # Bug caught: a wait for ranks that themselves wait, in a collective, for the failed rank.
    ranks.reply("first", failing=(0,), ranks=[0])
    with pytest.raises(RuntimeError, match="first of 0"):
        ranks.call()


def test_whoever_reads_on_after_a_failure_gets_the_same_calls_replies(ranks: Ranks) -> None:
    ranks.reply("first", failing=(0,))
    assert [replies.dequeue()[1] for replies in ranks.executor.response_mqs] == all_of("first")
    ranks.reply("second")
    assert ranks.call() == all_of("second")


def test_an_engine_after_a_refused_one_can_scan_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bug caught: the refused engine imported numba after the plugin had looked for it, and vLLM's CPU worker, which
    # calls vars() on every module's attributes, died in the next engine, although that was a BF16 one.
    from llvmlite.binding import ffi

    ffi.lib._fntab.pop("__dict__", None)
    replies.install()
    seen = []
    monkeypatch.setattr(UniProcExecutor, "_init_executor", lambda self: seen.append(vars(ffi.lib)))
    names = ("model", "cache", "lora", "load", "parallel", "scheduler", "device")
    none = {f"{name}_config": None for name in (*names, "speculative", "observability")}
    UniProcExecutor(SimpleNamespace(**none))
    assert [type(found) for found in seen] == [dict]
