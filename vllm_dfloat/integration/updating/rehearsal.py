"""Compare a checkpoint with the model that it will update, using the files' headers, before anything changes.

The model's own load_weights gets tensors without data. So its own name maps, shards per rank and shape checks apply,
and vLLM's own records show what is missing.
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
    """An iterator over the (name, tensor) pairs of a checkpoint, with their shapes.

    Attributes:
        pairs: the pairs.
        where: the checkpoint, for messages.
        shapes: (name, shape) of all pairs, from the files' headers; empty if these are not known.
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
    """Makes a copy of a meta tensor into a tensor with memory, such as a bias, do nothing instead of fail."""

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
        load: passes pairs to the model's load_weights; it must not process complete layers meanwhile.

    Raises:
        UnsupportedError: a tensor is missing, unknown or of another shape.
    """
    if not stored.shapes:
        return
    try:
        with _WithoutData():  # type: ignore[no-untyped-call]
            loaded = load(stored.without_data())
        _check_missing(model, loaded, stored.where, vllm_config)
    except NotImplementedError as error:  # the model reads the values of its tensors
        logger.debug("dfloat11: %s was not compared with the model before: %s", stored.where, error)
    finally:
        layerwise.forget_arrivals(model)


def what_is_short(layer: torch.nn.Module, name: str) -> str:
    """Return, for a message, what has and has not arrived of a layer; "" if it is complete.

    Also "" for layers without matrices for which nothing arrived: vLLM's own check covers them.
    """
    if layer_kinds.is_experts(layer):
        return arrivals.missing_experts(
            layer, name
        )  # not by their number: names of them may overlap
    arrived, expected = layerwise.arrived(layer)
    if arrived >= expected:
        return ""
    if compat.holds_a_matrix(layer):
        return f"{name}: {arrived} of {expected} weights arrived"
    missing = layerwise.without_arrivals(layer) if arrived else []
    return f"{name}: nothing arrived for {', '.join(missing)}" if missing else ""


def needs_data(error: Exception) -> bool:
    """Return whether a model failed only because it read the values of tensors without data."""
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
