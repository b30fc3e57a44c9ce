"""Check that a checkpoint loads every part of a model's weights: projections of a fused layer, experts, biases.

vLLM's own check counts a parameter as loaded when any part of it has arrived. It skips every layer that has a
quantization method, and linear layers, embeddings and experts always have one. So a model without k_proj, or without
one expert, would be served from uninitialised memory.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import layer_kinds, layerwise
from vllm_dfloat.integration.seam.layer_parts import Part, num_rows, parts_of

# The ops with which weight loaders write. In-place arithmetic is no arrival.
_WRITES = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "copy_",
        "fill_",
        "zero_",
        "uniform_",
        "normal_",
        "index_put_",
        "index_copy_",
        "scatter_",
    )
)
_SHOWN = 4  # largest number of incomplete parameters that a message names
EXPECTED = (
    "All were expected: the checkpoint is incomplete or belongs to another model. Get it whole."
)

Box = tuple[int, int, int, int]  # first row, stop, first column, width


@dataclass
class Awaited:
    """One parameter, its parts, and the boxes written in it so far.

    Attributes:
        layer: the module of the parameter.
        name: path of the parameter.
        row_numel: elements per row.
    """

    layer: torch.nn.Module
    name: str
    parameter: torch.Tensor
    parts: Sequence[Part]
    row_numel: int
    boxes: set[Box] = field(default_factory=set)

    def note(self, view: torch.Tensor) -> None:
        """Record that a view of the parameter was written."""
        if not view.numel():
            return
        if view.dim() > 2 and not view.is_contiguous():  # padding lies between its matrices
            for matrix in view.unbind():
                self.note(matrix)
            return
        first = int(view.storage_offset() - self.parameter.storage_offset())
        steps = zip(view.shape, view.stride(), strict=True)
        last = first + sum((size - 1) * stride for size, stride in steps)
        start, stop = first // self.row_numel, last // self.row_numel + 1
        self.boxes.add((start, stop, first % self.row_numel, view.numel() // (stop - start)))

    def arrived(self, part: Part) -> int:
        """Return how many elements of a part were written; elements written twice count once."""
        by_columns: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for start, stop, column, width in self.boxes:
            start, stop = max(start, part.start), min(stop, part.stop)
            if start < stop:
                by_columns[column, width].append((start, stop))
        found = sum(width * _union(rows) for (_, width), rows in by_columns.items())
        return min(found, self.expected(part))

    def expected(self, part: Part) -> int:
        return (part.stop - part.start) * self.row_numel if part.due is None else part.due

    def is_missing(self, part: Part) -> bool:
        found, expected = self.arrived(part), self.expected(part)
        return found < expected if part.is_whole else found < min(1, expected)

    @property
    def is_incomplete(self) -> bool:
        return any(map(self.is_missing, self.parts))


def _union(intervals: list[tuple[int, int]]) -> int:
    total, end = 0, 0
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


class _Noting(TorchDispatchMode):
    """A dispatch mode that records the writes into some parameters."""

    def __init__(self, parameters: Iterable[Awaited]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_storage: dict[int, Awaited] = {}
        for awaited in parameters:
            self._by_storage.setdefault(_storage(awaited.parameter), awaited)  # tied ones once

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _WRITES and isinstance(args[0], torch.Tensor):
            awaited = self._by_storage.get(_storage(args[0]))
            if awaited is not None:
                awaited.note(args[0])
        return func(*args, **(kwargs or {}))


class Arrivals(_Noting):  # type: ignore[no-untyped-call]  # TorchDispatchMode's __init_subclass__
    """A dispatch mode that records the writes into the parameters that a model has when this object is created."""

    def __init__(self, model: torch.nn.Module) -> None:
        fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        super().__init__(_awaited(model, fused))

    def check(
        self, model: torch.nn.Module, where: str, may_be_empty: Callable[[torch.nn.Module], bool]
    ) -> None:
        """Refuse a model with parts that never arrived.

        Args:
            where: path or name of the checkpoint, for the message.
            may_be_empty: whether vLLM may replace a layer later, so that it may be without any arrival.

        Raises:
            UnsupportedError: it names the incomplete parameters and their missing parts.
        """
        kept = set(model.modules())
        incomplete = [
            awaited
            for awaited in self._by_storage.values()
            if awaited.layer in kept
            and awaited.is_incomplete
            and not (not awaited.boxes and may_be_empty(awaited.layer))
        ]
        if incomplete:
            raise UnsupportedError(f"{where}: {_sentence(incomplete)}")


def check_weight(layer: Any, name: str) -> int:
    """Check that a layer's weight is complete before it is packed, by repeating vLLM's recorded calls of its loader.

    Returns:
        The number of elements that arrived.

    Raises:
        UnsupportedError: some did not arrive; it names the missing parts.
    """
    meta = layerwise.on_meta(layer.weight)
    fused = getattr(getattr(layer, "quant_config", None), "packed_modules_mapping", {})
    parts = list(parts_of(layer, name, "weight", meta, fused))
    awaited = Awaited(layer, f"{name}.weight", meta, parts, meta.shape[-1])
    with _Noting([awaited]):
        layerwise.repeat_loading(layer, "weight", meta)
    if awaited.is_incomplete:
        raise UnsupportedError(_sentence([awaited]))
    return sum(map(awaited.arrived, parts))


def check_experts(layer: Any, name: str) -> None:
    """Check that all matrices of routed experts have arrived, before they are packed.

    Raises:
        UnsupportedError: some did not arrive; it names the experts.
    """
    if missing := missing_experts(layer, name):
        raise UnsupportedError(f"{missing}. {EXPECTED}")


def missing_experts(layer: Any, name: str) -> str:
    """Return a description of what has not arrived in an update of routed experts on the meta device, "" if all has.

    The count of elements is not enough: padding for a kernel never arrives, and a tensor for all experts counts once
    more where single experts come too. So each matrix of each expert is checked.
    """
    incomplete = []
    for leaf, parameter in layer.named_parameters(recurse=False):
        parts = list(parts_of(layer, name, leaf, parameter, {}))
        meta = layerwise.on_meta(parameter)
        awaited = Awaited(layer, f"{name}.{leaf}", meta, parts, meta.numel() // num_rows(meta))
        with _Noting([awaited]):
            layerwise.repeat_loading(layer, leaf, meta)
        if awaited.is_incomplete:
            incomplete.append(awaited)
    return _named(incomplete) if incomplete else ""


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without storage
        return 0


def _sentence(incomplete: Sequence[Awaited]) -> str:
    return f"{_named(incomplete)}. {EXPECTED}"


def _named(incomplete: Sequence[Awaited]) -> str:
    named = []
    for awaited in incomplete[:_SHOWN]:
        missing = [part.label for part in awaited.parts if awaited.is_missing(part) and part.label]
        found = sum(map(awaited.arrived, awaited.parts))
        expected = sum(map(awaited.expected, awaited.parts))
        of = f" (missing: {_listed(missing)})" if missing else ""
        named.append(f"{awaited.name}: {found} of {expected} weights arrived{of}")
    more = len(incomplete) - len(named)
    also = f"; and {more} more parameters are incomplete" if more else ""
    return f"{'; '.join(named)}{also}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _awaited(model: torch.nn.Module, fused: Mapping[str, list[str]]) -> Iterator[Awaited]:
    for path, layer in model.named_modules():
        owner = model.get_submodule(path.rpartition(".")[0])
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.numel() or not parameter.is_contiguous():
                continue
            if name == "bias" and layer_kinds.may_lack_bias(owner):
                continue
            parts = list(parts_of(layer, path, name, parameter, fused))
            if parts:
                yield Awaited(
                    layer,
                    f"{path}.{name}",
                    parameter,
                    parts,
                    parameter.numel() // num_rows(parameter),
                )
