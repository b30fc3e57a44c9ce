"""Guards of the methods by which vLLM's model runner and worker take new weights: a failure on one rank undoes all."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers.method import desc_name
from vllm_dfloat.integration.layers.placeholder import decoded_by_detach
from vllm_dfloat.integration.seam import offloader
from vllm_dfloat.integration.updating import calls, guards
from vllm_dfloat.integration.updating.agreement import from_all_ranks
from vllm_dfloat.integration.updating.update import Updates, updates_of

_RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)
_WORKER = ("vllm.v1.worker.gpu_worker", "Worker")
_PROCESS = ("vllm.v1.executor.multiproc_executor", "WorkerProc")
_SOURCE = (
    "model",
    "model_weights",
    "revision",
)  # fields of the ModelConfig that a reload from a path changes

Method = Callable[..., Any]
Pairs = Iterable[tuple[str, torch.Tensor]]


def install() -> None:
    """Guard the runner and worker classes imported in this process. A second call changes nothing."""
    for place in _RUNNERS:
        _wrap(place, "reload_weights", _reload_weights)
    for name in ("update_weights", "finish_weight_update"):
        _wrap(_WORKER, name, _of_transfer)
    for name in ("start_weight_update", "start_draft_weight_update"):
        _wrap(_WORKER, name, _start_of_transfer)
    _wrap(_PROCESS, "worker_busy_loop", calls.counting)
    _wrap(_WORKER, "reset_weights", _reset_weights)
    _wrap(_WORKER, "compute_weight_checksums", _checksums)
    _wrap(_WORKER, "sleep", _sleep)
    for name in ("save_sharded_state", "save_tensorized_model"):
        _wrap(_WORKER, name, _save)


def _wrap(place: tuple[str, str], name: str, guard: Callable[..., Any]) -> None:
    cls = getattr(sys.modules.get(place[0]), place[1], None)
    method = vars(cls).get(name) if cls is not None else None
    if method is None or hasattr(method, "_dfloat11_guard"):
        return

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return guard(self, method, *args, **kwargs)

    vars(guarded)["_dfloat11_guard"] = True
    setattr(cls, name, guarded)


def _reload_weights(runner: Any, method: Method, *args: Any, **kwargs: Any) -> Any:
    updates = updates_of(runner.get_model())
    if updates is None:
        return method(runner, *args, **kwargs)
    given = inspect.signature(method).bind(runner, *args, **kwargs)
    iterator = given.arguments.get("weights_iterator")
    if iterator is not None and not given.arguments.get("is_checkpoint_format", True):
        given.arguments["weights_iterator"] = _saving(updates, iterator)
    with _on_all_ranks(updates), _same_source_on_error(runner.vllm_config.model_config):
        return method(*given.args, **given.kwargs)


def _saving(updates: Updates, pairs: Pairs) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights in a kernel's format; before each, save the tensor that it will overwrite.

    Raises:
        UnsupportedError: a weight of a compressed layer.
    """
    for name, weight in pairs:
        path, _, leaf = name.rpartition(".")
        layer: Any = updates.model.get_submodule(path)
        layer = getattr(layer, "base_layer", layer)  # under LoRA
        target = getattr(layer, leaf, None)
        for parameter, placeholder in guards.placeholders_of(layer).items():
            if leaf in (parameter, desc_name(parameter)):
                placeholder.refuse(f"{leaf} in kernel format")
        if isinstance(target, torch.Tensor):
            updates.save_tensor(target)
        yield name, weight


def _of_transfer(worker: Any, method: Method, *args: Any, **kwargs: Any) -> Any:
    updates = _receiver(worker)
    if updates is None:
        return method(worker, *args, **kwargs)
    try:
        with _on_all_ranks(updates):
            return method(worker, *args, **kwargs)
    except BaseException:
        # As vLLM does if update_weights itself fails on this rank; otherwise no later update could start.
        worker._weight_update_active = False
        worker.weight_transfer_engine.reset_weight_update_target()
        raise


def _start_of_transfer(worker: Any, method: Method) -> Any:
    updates, engine = _receiver(worker), type(worker.weight_transfer_engine).__name__
    if updates is not None and engine.startswith("Sparse"):
        guards.refuse(updates.model, f"{engine}, which changes single values in place,")
    if worker._weight_update_active:
        return method(worker)  # it raises, and does not touch the update that is in progress
    return _of_transfer(worker, method)


def _reset_weights(worker: Any, method: Method) -> Any:
    guards.refuse(worker.model_runner.get_model(), "reset_weights")
    return method(worker)


def _checksums(worker: Any, method: Method) -> Any:
    with decoded_by_detach():
        return method(worker)


def _save(worker: Any, method: Method, *args: Any, **kwargs: Any) -> Any:
    if updates_of(worker.model_runner.get_model()) is not None:
        raise UnsupportedError(
            f"{method.__name__}: it writes parameters as they lie in memory, and those of compressed layers have no "
            "values; expected an engine without compressed layers. Nothing was written. To write a compressed model, "
            "give its checkpoint to `vllm-dfloat compress`; serve without dfloat11 to save this form."
        )
    return method(worker, *args, **kwargs)


def _sleep(worker: Any, method: Method, *args: Any, **kwargs: Any) -> Any:
    offloader.wait_for_copies()  # into memory that is about to go
    return method(worker, *args, **kwargs)


def _receiver(worker: Any) -> Updates | None:
    """Return the Updates of the model that the worker's transfer engine writes to, target or draft."""
    model = getattr(worker.weight_transfer_engine, "model", None)
    return None if model is None else updates_of(model)


@contextmanager
def _on_all_ranks(updates: Updates) -> Iterator[None]:
    """Undo an update on every rank if it failed on one: otherwise ranks would serve different weights.

    Raises:
        UnsupportedError: it failed on other ranks only, or they did not take part; the message has their reasons,
            since vLLM reports one rank.
    """
    with updates.undone_on_error():
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        reasons = from_all_ranks([] if error is None else [f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        if reasons:
            raise UnsupportedError(
                "an update of the weights failed on another rank; all weights are as before, on this rank too. "
                f"The other says: {'; '.join(reasons)}"
            )


@contextmanager
def _same_source_on_error(model_config: Any) -> Iterator[None]:
    """If a reload from a path fails, restore the source in the ModelConfig, for later reloads without a path."""
    before = {name: getattr(model_config, name) for name in _SOURCE if hasattr(model_config, name)}
    try:
        yield
    except BaseException:
        for name, value in before.items():
            setattr(model_config, name, value)
        raise
