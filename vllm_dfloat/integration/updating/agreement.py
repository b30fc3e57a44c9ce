"""What the ranks of an engine tell each other at the end of an update; none waits for a rank that will not come.

Each rank puts what it has to say into torch's distributed store, under the number of the call that the update is part
of. A rank that leaves the call without taking part, since a worker's code failed before, is noticed at once.
"""

import json
import time
from typing import Any

import torch

from vllm_dfloat.integration.updating import calls

TIMEOUT = 1800.0  # seconds; as long as torch's collectives on the host wait. Ranks may load at different speeds
_PAUSE = 0.02  # seconds between two looks


def from_all_ranks(sentences: list[str]) -> list[str]:
    """Return the sentences of all ranks of this engine, without repeats; every rank must call this once.

    Ranks that do not come within `TIMEOUT`, or leave the call before, are a sentence too.
    """
    from vllm.distributed import parallel_state

    calls.current.num_agreements += 1
    for kind in ("tp", "pp", "pcp"):
        group = getattr(parallel_state, f"get_{kind}_group")()
        if group.world_size > 1:
            heard = _gather(kind, group.cpu_group, sentences)
            sentences = list(dict.fromkeys(sentence for said in heard for sentence in said))
    return sentences


def _gather(kind: str, group: Any, sentences: list[str]) -> list[list[str]]:
    if not calls.current.number:  # the executor is another: nothing says which call a rank is in
        heard: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(heard, sentences, group=group)
        return heard
    ranks = torch.distributed.get_process_group_ranks(group)
    number, nth = calls.current.number, calls.current.num_agreements
    place = f"dfloat11/update/{number}.{nth}/{kind}{ranks[0]}"
    store, deadline = calls.store(), time.monotonic() + TIMEOUT
    store.set(f"{place}/{torch.distributed.get_rank()}", json.dumps(sentences))
    said: dict[int, list[str]] = {}
    while True:
        for rank in ranks:
            if rank not in said:
                last, error = calls.ended(
                    rank
                )  # before its words: it says them before its call ends
                if store.check([f"{place}/{rank}"]):
                    said[rank] = json.loads(store.get(f"{place}/{rank}"))
                elif last >= number:
                    said[rank] = [_left(rank, error if last == number else "")]
        if len(said) == len(ranks):
            return [*said.values(), *_decided(place, "")]
        if time.monotonic() > deadline:
            late = ", ".join(str(rank) for rank in ranks if rank not in said)
            return [*said.values(), *_decided(place, f"rank {late} did not come in {TIMEOUT:g} s")]
        time.sleep(_PAUSE)


def _decided(place: str, sentence: str) -> list[list[str]]:
    """Return what the first rank decided that came to an end of waiting: [], or the sentence of one that gave up.

    So a rank that comes after another gave up does not take what that had said before for its consent.
    """
    decided = calls.store().compare_set(f"{place}/decided", "", sentence or "heard").decode()
    return [] if decided == "heard" else [[decided]]


def _left(rank: int, error: str) -> str:
    return f"rank {rank} left the call without taking part in the update{f' ({error})' if error else ''}"
