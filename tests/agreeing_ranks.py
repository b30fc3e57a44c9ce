"""Two ranks without an engine, which get calls as vLLM's executor gives them, and end updates together.

python agreeing_ranks.py FOLDER: writes a file per rank, named after it, with JSON: what each call came to.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed import parallel_state

from vllm_dfloat.integration.updating import agreement, calls, worker

NUM_RANKS = 2
UPDATES: Any = SimpleNamespace(undone_on_error=nullcontext)


def update() -> None:
    with worker._on_all_ranks(UPDATES):
        pass


def fail_before(rank: int) -> None:
    if rank == 1:
        raise FileNotFoundError("no such checkpoint")
    update()


def come_late(rank: int) -> None:
    agreement.TIMEOUT = 0.5
    if rank == 1:
        time.sleep(1.5)
    update()


def twice_on_one(rank: int) -> None:
    agreement.TIMEOUT = 1800.0
    for _ in range(NUM_RANKS - rank):
        update()


CALLS: list[Callable[[int], None]] = [
    lambda _: update(),
    fail_before,
    lambda _: update(),
    come_late,
    twice_on_one,
    lambda _: update(),
]


class Queue:
    """Gives the calls; a rank takes the next one as soon as it has ended the one before."""

    def __init__(self) -> None:
        self.calls = list(CALLS)

    def dequeue(self, indefinite: bool) -> tuple[Callable[[int], None]]:
        return (self.calls.pop(0),)


def busy_loop(proc: Any) -> None:
    """Do as vLLM's loop does."""
    for _ in CALLS:
        (call,) = proc.rpc_broadcast_mq.dequeue(indefinite=True)
        try:
            call(proc.rank)
            proc.handle_output("done")
        except Exception as error:
            proc.handle_output(error)
    calls.end()


def run(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=NUM_RANKS
    )
    for kind, size in (("tp", NUM_RANKS), ("pp", 1), ("pcp", 1)):
        group = SimpleNamespace(world_size=size, cpu_group=torch.distributed.group.WORLD)
        setattr(parallel_state, f"get_{kind}_group", lambda group=group: group)
    said: list[str] = []
    proc = SimpleNamespace(
        rank=rank, rpc_broadcast_mq=Queue(), handle_output=lambda output: said.append(str(output))
    )
    calls.counting(proc, busy_loop)
    torch.distributed.barrier()
    (folder / str(rank)).write_text(json.dumps(said))


def main(folder: Path) -> int:
    """Run both ranks, as children of this process, which has imported vLLM for them."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, folder)) for rank in range(NUM_RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
