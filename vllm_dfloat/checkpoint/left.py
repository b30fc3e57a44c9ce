"""Tell what a conversion left: few lines, however much it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_dfloat.checkpoint.plan_units import natural
from vllm_dfloat.errors import one_line

MAX_FILES = 10  # that are named


def left_lines(left: Mapping[str, str]) -> list[str]:
    """Return a sentence per kind of reason.

    Args:
        left: tensor name -> why it was not compressed. Reasons that differ in their numbers only are of one kind.
    """
    kinds: dict[str, list[str]] = {}
    for name, reason in left.items():
        kinds.setdefault(re.sub(r"\d+", "#", reason), []).append(name)
    return [_line(names, left) for names in kinds.values()]


def _line(names: list[str], left: Mapping[str, str]) -> str:
    first, *others = sorted(names, key=natural)
    reason = left[first]
    if not others:
        return f"{first}: stays as it is: {reason}"
    if any(left[name] != reason for name in others):
        reason += " (the first of them)"
    return f"{len(names)} tensors, {first} to {others[-1]}: stay as they are: {reason}"


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """Return a sentence for each file beside the weights that was not copied, and one for those beyond `MAX_FILES`.

    Args:
        left_out: file -> why it was not copied.
    """
    lines = [one_line(f"{name}: is not copied: it {reason}") for name, reason in left_out.items()]
    hidden = len(lines) - MAX_FILES
    if hidden > 0:
        lines[MAX_FILES:] = [f"... and {hidden} more files are not copied"]
    return lines
