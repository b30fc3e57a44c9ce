"""Names of tensors and modules: dotted paths, in which a number is a place in a list of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_INNERMOST_BLOCK = re.compile(r"(.*\.|)\d+(?=\.)")


def natural(path: str) -> tuple[Any, ...]:
    """Return a sort key under which layers.2 comes before layers.10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.split(".")
    )


def first_number(parts: Sequence[str]) -> int | None:
    """Return the index of the first part of a path that is a number, None if there is none."""
    return next((i for i, part in enumerate(parts) if part.isdecimal()), None)


def transformer_block(path: str) -> str:
    """Return the path up to its first number ("model.layers.3"), or all of it if it has none."""
    parts = path.split(".")
    number = first_number(parts)
    return path if number is None else ".".join(parts[: number + 1])


def innermost_block(name: str) -> str:
    """Return the path up to the last number that is followed by more, nothing if there is none.

    "model.layers.3.mlp.down_proj" belongs to "model.layers.3".
    """
    found = _INNERMOST_BLOCK.match(name)
    return found.group() if found else ""


def module_of(name: str) -> str:
    """Return the module that a tensor belongs to: its name without the last part."""
    return name.rpartition(".")[0]
