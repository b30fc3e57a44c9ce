"""A checkpoint compared with the model that it is to update, from the headers of its files, before anything changes.

The model's own load_weights is given tensors without data. So every name map, every cut for a rank and every shape that
it asks for is its own, and what the checkpoint lacks is what vLLM counts as missing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import arrivals, compat, layer_kinds, layerwise
from vllm_dfloat.integration.seam.names import logger

Pairs = Iterator[tuple[str, torch.Tensor]]


@dataclass
class StoredWeights(Iterator[tuple[str, torch.Tensor]]):
    """The (name, tensor) pairs of a checkpoint on their way into a model.

    Attributes:
        pairs: where they come from.
        where: the checkpoint, for messages.
        shapes: (name, shape) of all of them, from the files' headers; empty if these are not known.
    """

    pairs: Pairs
    where: str
    shapes: Sequence[tuple[str, Sequence[int]]]

    def __next__(self) -> tuple[str, torch.Tensor]:
        return next(self.pairs)

    def without_data(self) -> Pairs:
        """Yield the same names, with tensors on the meta device."""
        for name, shape in self.shapes:
            yield name, torch.empty(tuple(shape), dtype=torch.bfloat16, device="meta")


class _WithoutData(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Lets a tensor without data be copied into one that has memory, as biases have: nothing is written."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def rehearse(
    model: torch.nn.Module, load: Callable[[Pairs], Any], stored: StoredWeights, vllm_config: Any
) -> None:
    """Refuse a checkpoint that does not fit a model whose layers wait for weights.

    Args:
        load: gives pairs to the model's load_weights; layers that are complete must not be processed meanwhile.

    Raises:
        UnsupportedError: a tensor is missing, unknown or of another shape.
    """
    if not stored.shapes:
        return
    try:
        with _WithoutData():  # type: ignore[no-untyped-call]
            loaded = load(stored.without_data())
        _check_missing(model, loaded, stored.where, vllm_config)
    except NotImplementedError as error:  # a model that looks into its tensors
        logger.debug("dfloat11: %s was not compared with the model before: %s", stored.where, error)
    finally:
        layerwise.forget_arrivals(model)


def what_is_short(layer: torch.nn.Module, name: str) -> str:
    """Return what has arrived of a layer and what not, in the words of a message; "" if all has, or nothing was due.

    Layers without matrices that got nothing are left to vLLM's own check.
    """
    arrived, expected = layerwise.arrived(layer)
    if arrived >= expected:
        return ""
    if layer_kinds.is_experts(layer):
        return arrivals.missing_experts(layer, name)
    if compat.holds_a_matrix(layer):
        return f"{name}: {arrived} of {expected} weights arrived"
    missing = layerwise.without_arrivals(layer) if arrived else []
    return f"{name}: nothing arrived for {', '.join(missing)}" if missing else ""


def needs_data(error: Exception) -> bool:
    """Return whether a model failed only because it looked into tensors that have no data."""
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error)


def _check_missing(
    model: torch.nn.Module, loaded: set[str] | None, where: str, vllm_config: Any
) -> None:
    short = list(
        filter(None, (what_is_short(layer, name) for name, layer in model.named_modules()))
    )
    if short:
        more = f" and {len(short) - 4} more layers" if len(short) > 4 else ""
        raise UnsupportedError(f"{where}: incomplete: {'; '.join(short[:4])}{more}. {_ALL}")
    try:
        compat.check_loaded(model, loaded, vllm_config)
    except ValueError as error:
        raise UnsupportedError(f"{where}: {error}. {_ALL}") from error


_ALL = (
    "All were expected: the checkpoint is incomplete or belongs to another model. All weights are as before. Get it "
    "whole, or give some layers alone as weights_iterator."
)
