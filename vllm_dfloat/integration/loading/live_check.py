"""A check of a live server: have the compressed weights in memory changed since encoding?

    llm.collective_rpc("check_dfloat11_weights")        # one report per rank of the first engine

A forward pass does not compare checksums, so a bit flip in a payload while serving changes answers without an error.
This check finds it. It reads all payloads once; requests wait meanwhile.
"""

from collections.abc import Iterator
from typing import Any

import torch

from vllm_dfloat.device.ops import PackedWeight
from vllm_dfloat.errors import FormatError
from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.seam import workers

METHOD_NAME = "check_dfloat11_weights"


def install() -> None:
    """Add the method to vLLM's worker class, where `collective_rpc` finds it. A second call changes nothing."""
    setattr(workers.worker_class(), METHOD_NAME, check_worker)


def check_worker(worker: Any) -> dict[str, Any]:
    """Compare every compressed weight of a rank, including its draft model's, with its checksum and descriptor.

    Returns:
        Plain data: `rank`; `tensors` and `bytes`, the number compared; `damaged`, one sentence with the name for each
        tensor that has changed since encoding; `not_compared`, the bytes of parameters held as BF16, which have no
        checksum: trainers may write to them.

    Raises:
        FormatError: some have changed, and this is not the first engine of a data-parallel server, of which alone vLLM
            returns the reports.
    """
    report: dict[str, Any] = {"rank": int(getattr(worker, "rank", 0)), "tensors": 0, "bytes": 0}
    report |= {"damaged": [], "not_compared": 0}
    seen: set[int] = set()
    for model in workers.models_of(worker):
        for weight in _weights_of(model, seen):
            report["tensors"] += 1
            report["bytes"] += weight.num_bytes
            report["damaged"] += _damage(weight)
        report["not_compared"] += _plain_bytes(model, seen)
    engine = workers.data_parallel_index(worker)
    if engine and report["damaged"]:
        raise FormatError(
            f"engine {engine} of this data-parallel server, rank {report['rank']}: {'; '.join(report['damaged'])}"
        )
    return report


def _weights_of(model: torch.nn.Module, seen: set[int]) -> Iterator[PackedWeight]:
    """Yield the compressed weights of a model that are not in `seen`; tied weights once."""
    for layer in model.modules():
        for weight in weights_of(layer).values():
            if id(weight) not in seen:
                seen.add(id(weight))
                yield weight


def _damage(weight: PackedWeight) -> list[str]:
    try:
        weight.check_descriptor()
        weight.check_payload()
    except FormatError as error:
        return [str(error)]
    return []


def _plain_bytes(model: torch.nn.Module, seen: set[int]) -> int:
    total = 0
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in weights_of(layer) and id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.nbytes
    return total
