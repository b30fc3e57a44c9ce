"""The (name, tensor) pairs of an update, checked while vLLM's weight loaders load them into a model."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from inspect import BoundArguments
from typing import Any

import torch

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import layer_kinds

AS_BEFORE = "All weights are as before."


class Incoming(Iterator[tuple[str, torch.Tensor]]):
    """Yields the pairs and refuses a name given twice; remembers the last pair, and an error of the source.

    vLLM keeps the tensors of a layer until the layer is complete. The source may reuse their memory for the next
    pair, so the kept tensors are copied before the source continues.

    Attributes:
        error: the exception that the source raised, or None.
    """

    def __init__(
        self, pairs: Iterable[tuple[str, torch.Tensor]], seen: set[str], own_memory: bool
    ) -> None:
        """
        Args:
            pairs: the source.
            seen: names that this update has given so far; new names are added.
            own_memory: whether the source never writes to a tensor's memory again.
        """
        self._pairs = iter(pairs)
        self._seen = seen
        self._own_memory = own_memory
        self._kept: list[weakref.ref[BoundArguments]] = []
        self._name, self._shape = "the first tensor", ""
        self.error: BaseException | None = None

    def __next__(self) -> tuple[str, torch.Tensor]:
        self.copy_kept()
        try:
            name, tensor = next(self._pairs)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedError(
                f"{name}: {type(tensor).__name__}; expected a torch.Tensor. {AS_BEFORE} Give pairs of a name and a "
                "tensor; a request over HTTP can carry none, so there give a folder as weights_path."
            )
        self._name, self._shape = name, f" {list(tensor.shape)}"
        if name in self._seen:
            raise UnsupportedError(
                f"{name}: given twice in one update, of which vLLM would drop one; expected once. {AS_BEFORE} "
                "Give it once."
            )
        self._seen.add(name)
        return name, tensor

    def __str__(self) -> str:
        return f"{self._name}{self._shape}"

    def called(self, loader: Callable[..., Any], call: BoundArguments, arrived: int) -> None:
        """Check and record a call of a weight loader, which vLLM keeps until its layer is complete.

        Raises:
            UnsupportedError: the tensor is larger or smaller than the layer expects.
        """
        given = sum(tensor.numel() for _, tensor in _tensors(call))
        taken = _taken(getattr(loader, "__self__", None), call, arrived, given)
        if given != taken:
            raise UnsupportedError(
                f"{self}: {given} weights; expected {taken}, as many as this model has for it. {AS_BEFORE} "
                "Give the tensors of this model."
            )
        if not self._own_memory:
            self._kept.append(weakref.ref(call))

    def copy_kept(self) -> None:
        """Copy the tensors that layers still keep of those given since the last call; complete layers keep none."""
        calls = [call for kept in self._kept if (call := kept()) is not None]
        self._kept.clear()
        for call in calls:
            for name, tensor in list(_tensors(call)):
                call.arguments[name] = tensor.clone()


def _tensors(call: BoundArguments) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a weight loader was given to load, by argument name."""
    for name, value in call.arguments.items():
        if name != "param" and isinstance(value, torch.Tensor):
            yield name, value


def _taken(layer: Any, call: BoundArguments, arrived: int, given: int) -> int:
    """Return how many elements of a tensor a layer takes on all ranks together; `given` if that is not known.

    vLLM cuts a tensor that is too large without an error, and accepts an expert that is too small. It checks the sizes
    of vocabularies itself.
    """
    if not arrived:
        return given
    if layer_kinds.is_linear(layer):
        num_ranks = int(getattr(layer, "tp_size", 0)) or given
        is_kv = call.arguments.get("loaded_shard_id") in ("k", "v")
        num_copies = int(getattr(layer, "num_kv_head_replicas", 1)) if is_kv else 1
        return min(given, arrived * num_ranks // num_copies)
    is_matrix = all(tensor.dim() == 2 for _, tensor in _tensors(call))
    is_one = call.arguments.get("shard_id") in ("w1", "w2", "w3")
    if not (layer_kinds.is_experts(layer) and is_matrix and is_one):
        return given
    due = layer_kinds.numel_of_expert(layer, "w2_weight")  # gate and up have as many
    return given if due is None else due * int(layer.moe_config.moe_parallel_config.tp_size)
