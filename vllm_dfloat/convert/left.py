"""What a conversion left out, in few lines, however much it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_dfloat.checkpoint.names import natural
from vllm_dfloat.errors import one_line

MAX_LINES = 20  # about files that are not copied
MAX_OF_KIND = 3  # files that have a line each


def left_lines(left: Mapping[str, str]) -> list[str]:
    """Return a sentence per kind of reason.

    Args:
        left: tensor name -> why it was not compressed. Reasons that differ only in numbers are one kind.
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
    """Return which files beside the weights were not copied, and why: a line per file, or per kind of many files.

    A kind is a folder and a reason. All lines after `MAX_LINES` become one.

    Args:
        left_out: file -> why it was not copied.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, reason in left_out.items():
        kinds.setdefault((name.rpartition("/")[0], reason), []).append(name)
    lines: list[tuple[str, int]] = []
    for (_, reason), names in kinds.items():
        if len(names) > MAX_OF_KIND:
            line = f"{len(names)} files, {names[0]} to {names[-1]}: are not copied: each {reason}"
            lines.append((line, len(names)))
        else:
            lines += [(f"{name}: is not copied: it {reason}", 1) for name in names]
    hidden = sum(count for _, count in lines[MAX_LINES:])
    shown = [one_line(line) for line, _ in lines[:MAX_LINES]]
    return [*shown, f"... and {hidden} more files are not copied"] if hidden else shown
