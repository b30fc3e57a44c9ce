"""Which weights a DFloat11 checkpoint has, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from vllm_dfloat.checkpoint.names import module_of, natural, transformer_block
from vllm_dfloat.checkpoint.reader import Dfloat11Checkpoint
from vllm_dfloat.checkpoint.shapes import Shapes, model_shapes, resolve_shape
from vllm_dfloat.dfloat11.unit_entry import UnitEntry
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.stored_tensor import StoredTensor


@dataclass(frozen=True)
class Member:
    """One weight of a unit.

    Attributes:
        name: tensor name in the original checkpoint, such as "model.layers.0.mlp.up_proj.weight".
        entry: the unit.
        start, stop: its weights within the unit, stop excluded.
        shape: (out_features, in_features).
    """

    name: str
    entry: UnitEntry
    start: int
    stop: int
    shape: tuple[int, ...]


def shapes_of(checkpoint: Dfloat11Checkpoint, model: Any = None, advice: str = "") -> Shapes:
    """Return the shapes of a checkpoint's weights: from its manifest, or else of a model class.

    Args:
        checkpoint: an open checkpoint.
        model: what describes the model, as for `model_shapes`; None for the checkpoint's own config.json.
        advice: as for `model_shapes`.

    Raises:
        UnsupportedError: there is no manifest, and transformers does not know the model, or is not installed.
    """
    if checkpoint.manifest:
        return checkpoint.manifest.module_shapes
    return model_shapes(checkpoint.path if model is None else model, advice)


def unit_members(entry: UnitEntry, shapes: Shapes | None = None) -> list[Member]:
    """Return the weights of a unit in storage order; without `shapes` they are [1, n].

    Raises:
        FormatError: a size in the file and a size in `shapes` differ.
    """
    where = f"{entry.fields['split_positions'].where}"
    paths = [f"{entry.name}.{member}" for member in entry.members]
    if not paths or (entry.num_members == 1 and (len(paths) > 1 or entry.name in (shapes or ()))):
        # The module itself is the weight, and the list means nothing.
        paths = [entry.name]
        if entry.members and shapes is not None and entry.name not in shapes:
            raise FormatError(
                f"{where}: found 1 weight; {len(entry.members)} are expected by pattern_dict: "
                f"{', '.join(entry.members)}."
            )
    bounds = entry.splits.tolist()
    members = []
    for path, start, stop in zip(paths, bounds[:-1], bounds[1:], strict=True):
        shape: tuple[int, ...] = (1, stop - start)
        if shapes is not None:
            shape = resolve_shape(path, stop - start, shapes, where)
        name = path if path in entry.parameters else f"{path}.weight"
        members.append(Member(name, entry, start, stop, shape))
    return members


def plan(
    checkpoint: Dfloat11Checkpoint,
    shapes: Shapes | None,
    skip: Callable[[str], bool] | None = None,
) -> list[Member | StoredTensor]:
    """Return what `weights` yields, in its order, without decoding.

    Raises:
        FormatError: sizes do not fit `shapes`, or two things have one name.
    """
    members = [
        member for entry in checkpoint.units.values() for member in unit_members(entry, shapes)
    ]
    items: list[Member | StoredTensor] = [*members, *checkpoint.plain.values()]
    _refuse_stored_twice(items)
    modules = {module_of(member.name): member for member in members}
    items = [item for item in items if not (skip and skip(item.name))]
    return sorted(items, key=lambda item: _order(item.name, modules))


def _refuse_stored_twice(items: Iterable[Member | StoredTensor]) -> None:
    """Refuse two tensors of one name: by `shapes` a unit may itself be a weight that is also stored plain."""
    seen = set()
    for item in items:
        if item.name in seen:
            tensor = item if isinstance(item, StoredTensor) else item.entry.fields["luts"]
            raise FormatError(
                f"{tensor.where}: the weight {item.name} is also in another place; it is expected once."
            )
        seen.add(item.name)


def spans(items: Iterable[Member | StoredTensor]) -> Iterator[StoredTensor]:
    """Yield the parts of files that hold these items, under their names. For unit members the range is estimated."""
    for item in items:
        if isinstance(item, StoredTensor):
            yield item
            continue
        for tensor in item.entry.fields.values():
            first = tensor.num_bytes * item.start // item.entry.num_weights
            last = tensor.num_bytes * item.stop // item.entry.num_weights
            yield replace(
                tensor, name=item.name, begin=tensor.begin + first, num_bytes=last - first
            )


def _order(name: str, modules: dict[str, Member]) -> tuple[Any, ...]:
    """Return the sort key: layer, then its units and their members as stored, then others; weight before bias."""
    module, _, leaf = name.rpartition(".")
    member = modules.get(module)
    rank: tuple[Any, ...] = (1, (), 0)
    if member:
        rank = (0, natural(member.entry.name), member.start)
    return (natural(transformer_block(module)), *rank, natural(module), leaf != "weight", leaf)
