"""vLLM's workers and executors, and the models that a worker holds."""

from typing import Any

import torch


def worker_class() -> Any:
    """Return the class of vLLM's workers, whose methods `collective_rpc` calls by name."""
    from vllm.v1.worker.worker_base import WorkerBase

    return WorkerBase


def executor_class() -> Any:
    """Return the base class of vLLM's executors, through which the engine calls its ranks."""
    from vllm.v1.executor.abstract import Executor

    return Executor


def models_of(worker: Any) -> list[torch.nn.Module]:
    """Return the model of a worker and, if it has one, the draft model."""
    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    draft = getattr(drafter, "model", None)
    models = (
        [worker.get_model(), draft] if isinstance(draft, torch.nn.Module) else [worker.get_model()]
    )
    return models


def data_parallel_index(worker: Any) -> int:
    """Return the number of the worker's engine among those of a data-parallel server; 0 for the first or only one."""
    parallel = getattr(getattr(worker, "vllm_config", None), "parallel_config", None)
    return int(getattr(parallel, "data_parallel_index", 0) or 0)
