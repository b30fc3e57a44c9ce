"""The calls that this rank gets from vLLM's multiprocess executor, counted: every rank gets all of them, in one order.

So the number of a call means the same on every rank. When a call ends, the rank notes its number, and why it failed,
in torch's distributed store: a rank that waits for this one in an update learns that it will not come.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch

_EVERY_STEP = frozenset(
    ["execute_model", "sample_tokens", "take_draft_token_ids", "execute_dummy_batch"]
)  # hold no update, and must not wait for the store


@dataclass
class Current:
    """The call that this rank is in.

    Attributes:
        number: how many calls have begun; 0 if another executor starts the calls, and nobody counts them.
        method: what was called.
        error: why the call failed, once that is known.
        num_agreements: how many updates the ranks have agreed on in this call.
    """

    number: int = 0
    method: Any = None
    error: str = ""
    num_agreements: int = 0


current = Current()


def counting(proc: Any, busy_loop: Any) -> Any:
    """Run vLLM's loop over the calls of a rank, and count them."""
    proc.rpc_broadcast_mq = _Counted(proc.rpc_broadcast_mq)
    handle = proc.handle_output

    def handle_output(output: Any) -> Any:
        if isinstance(output, Exception):
            current.error = f"{type(output).__name__}: {output}"
        return handle(output)

    proc.handle_output = handle_output
    return busy_loop(proc)


def begin(method: Any) -> None:
    """Note that the next call has begun."""
    current.number += 1
    current.method, current.error, current.num_agreements = method, "", 0


def end() -> None:
    """Tell the other ranks that the call has ended, and why it failed."""
    if current.number and current.method not in _EVERY_STEP and torch.distributed.is_initialized():
        note = json.dumps([current.number, current.error])
        store().set(_place(torch.distributed.get_rank()), note)


def ended(rank: int) -> tuple[int, str]:
    """Return the number of the last call that a rank has noted as ended, and why that failed; (0, "") if none."""
    place = _place(rank)
    if not store().check([place]):
        return 0, ""
    number, error = json.loads(store().get(place))
    return number, error


def store() -> Any:
    """Return the store that all ranks share, of torch's default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def _place(rank: int) -> str:
    return f"dfloat11/ended/{rank}"


class _Counted:
    """The queue of a rank's calls: whoever takes the next one has ended the one before."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        end()
        call = self._queue.dequeue(*args, **kwargs)
        begin(call[0])
        return call
