"""Names of layers in a checkpoint and in vLLM's model, which fuses some: qkv_proj from q_proj, k_proj and v_proj.

A plan that is estimated from files has their names. `fused` is vLLM's packed_modules_mapping: the last part
of a fused layer's name -> those of its parts.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import compat

Fused = Mapping[str, list[str]]


def with_those_of_vllm(names: Set[str], mapper: Any) -> frozenset[str]:
    """Return names of layers, and what they are in vLLM's model if they are those in files.

    Args:
        mapper: vLLM's WeightsMapper of the model, or None.
    """
    return frozenset(names).union(mapper.apply_list(sorted(names)) if mapper else ())


def is_chosen(name: str, chosen: Set[str], fused: Fused) -> bool:
    """Return whether a layer of vLLM's is among those chosen, itself or with all its parts."""
    parent, dot, last = name.rpartition(".")
    parts = {f"{parent}{dot}{part}" for part in fused.get(last, ())}
    return name in chosen or (bool(parts) and parts <= chosen)


def is_ignored(name: str, ignore: Sequence[str], fused: Fused) -> bool:
    """Return whether `ignore` matches a layer, or the fused layer that a layer of a checkpoint is a part of."""
    parent, dot, last = name.rpartition(".")
    wholes = [f"{parent}{dot}{whole}" for whole, parts in fused.items() if last in parts]
    with suppress(
        ValueError
    ):  # some parts and not the others, as vLLM says when it makes the layer
        return any(compat.is_ignored(one, ignore, fused) for one in (name, *wholes))
    return False


def stays_bf16(name: str, ignore: Sequence[str], fused: Fused, where: str) -> bool:
    """Return whether `ignore` matches a layer of vLLM's: it, or all its parts.

    Args:
        where: the origin of `ignore`, for messages.

    Raises:
        UnsupportedError: it matches some parts of a fused layer, and not the others.
    """
    try:
        return compat.is_ignored(name, ignore, fused)
    except ValueError as error:
        parent, dot, last = name.rpartition(".")
        if last not in fused:
            raise
        parts = fused[last]
        matching = {
            part: [one for one in ignore if compat.is_ignored(f"{parent}{dot}{part}", [one], {})]
            for part in parts
        }
        entries = dict.fromkeys(entry for found in matching.values() for entry in found)
        raise UnsupportedError(
            f"{where}: ignore has {', '.join(map(repr, entries))}, of {name} only a part "
            f"({', '.join(part for part, found in matching.items() if found)}); expected {last} itself, or all of "
            f"{', '.join(parts)}. Name one or the other, or none."
        ) from error
