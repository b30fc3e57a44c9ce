"""The regular expressions of `pattern_dict`, matched in bounded time.

Python's engine backtracks, so a hostile config.json could hang the loader with a pattern such as `(a+)+`.
The work of a match grows exponentially only if a group with a quantifier or a choice is itself repeated.
Otherwise it grows with (length of the path) ** (number of quantifiers), times the numbers of choices. So a
pattern must have no such group, no look-around, no back-reference and few quantifiers. Paths are short, and
the steps for all units and patterns of a checkpoint are bounded. Published patterns have at most one quantifier.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import FormatError, UnsupportedError, shown

MAX_PATTERN = 256  # characters
MAX_PATH = 256
MAX_QUANTIFIERS = 3
MAX_PATTERNS = 256
MAX_PATHS = 4096  # attribute paths of one pattern
# Steps of the engine, for a checkpoint and for each unit of it; a core takes some hundred million steps per second.
MAX_STEPS, MAX_UNIT_STEPS = 1 << 26, 1 << 16

_QUANTIFIER = re.compile(r"(?:[*+?]|\{(?:\d+,?\d*|,\d+)\})[+?]?")
# It ends where the digits end, so there is one way to match it.
_DIGITS = re.compile(r"\\d[*+][+?]?(?=\\\.|$)")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)


@dataclass(frozen=True)
class Patterns:
    """Compiled patterns with the attribute paths of each.

    Attributes:
        where: file and key, for messages.
        entries: (compiled pattern, attribute paths) pairs.
    """

    where: str
    entries: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]

    def check_steps(self, paths: Sequence[str]) -> None:
        """Refuse to match `paths` if that could take long.

        Raises:
            UnsupportedError: it could take more than MAX_STEPS steps, and MAX_UNIT_STEPS for each path.
        """
        longest = min(MAX_PATH, max((len(path) for path in paths), default=0))
        steps = len(paths) * sum(_steps(key.pattern, longest) for key, _ in self.entries)
        if steps > MAX_STEPS + MAX_UNIT_STEPS * len(paths):
            worst = max(self.entries, key=lambda entry: _steps(entry[0].pattern, longest))[
                0
            ].pattern
            raise UnsupportedError(
                f"{self.where}: matching {len(self.entries)} patterns with {len(paths)} module paths of up to "
                f"{longest} characters could take {steps:.0e} steps; the costliest is {shown(worst)}. "
                "Module paths need no more than literal text, classes and a few quantifiers."
            )

    def members(self, path: str) -> tuple[str, ...] | None:
        """Return the attribute paths listed for module `path`, None if no pattern matches it.

        Raises:
            FormatError: two patterns match and their lists differ, or the path is too long.
        """
        if len(path) > MAX_PATH:
            raise FormatError(
                f"{self.where}: module path {path[:40]!r}... has {len(path)} characters; "
                f"at most {MAX_PATH} are matched."
            )
        found = [(key, members) for key, members in self.entries if key.fullmatch(path)]
        if len({members for _, members in found}) > 1:
            raise FormatError(
                f"{self.where}: {path} matches both {found[0][0].pattern!r} and "
                f"{found[1][0].pattern!r}, which list different weights."
            )
        return found[0][1] if found else None


def compile_patterns(pattern_dict: Mapping[str, Sequence[str]], where: str) -> Patterns:
    """Refuse keys of `pattern_dict` that could take long to match, and compile the others."""
    if len(pattern_dict) > MAX_PATTERNS:
        raise UnsupportedError(
            f"{where}: {len(pattern_dict)} patterns; at most {MAX_PATTERNS} are supported."
        )
    entries = []
    for key, members in pattern_dict.items():
        _check_cost(key, where)
        _check_members(members, f"{where}: {shown(key)}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # future warnings about odd character classes
                entries.append((re.compile(key), tuple(members)))
        except (re.error, OverflowError, RecursionError) as error:
            raise FormatError(
                f"{where}: {shown(key)} is not a regular expression: {error}."
            ) from error
    return Patterns(where, tuple(entries))


def _check_members(members: Sequence[str], where: str) -> None:
    if len(members) > MAX_PATHS:
        raise UnsupportedError(
            f"{where}: lists {len(members)} weights; at most {MAX_PATHS} are supported."
        )
    bad = [
        member for member in members if not 0 < len(member) <= MAX_PATH or not member.isprintable()
    ]
    if bad or len(set(members)) != len(members):
        found = shown(bad[0]) if bad else "one of them twice"
        raise FormatError(
            f"{where}: lists {found}; expected attribute paths of 1 to {MAX_PATH} printable characters, each once."
        )


def _steps(pattern: str, length: int) -> int:
    """Return a bound on the steps of matching a path of `length` characters.

    It is the number of ways through the pattern, times the literal text that each may compare. Quantifiers and choices
    in escapes and classes count too.
    """
    open_ended = _DIGITS.sub("", pattern)
    quantifiers = min(MAX_QUANTIFIERS, len(_QUANTIFIER.findall(open_ended)))
    ways: int = max(1, length) ** quantifiers // math.factorial(quantifiers)
    for group in re.findall(r"[^()]+", open_ended):
        ways *= 1 + group.count("|")
    return max(1, ways) * max(1, min(len(pattern), length))


def _check_cost(pattern: str, where: str) -> None:
    reason = None
    if len(pattern) > MAX_PATTERN:
        reason = f"it has {len(pattern)} characters, at most {MAX_PATTERN} are supported"
    else:
        reason = _costly_part(pattern)
    if reason:
        raise UnsupportedError(
            f"{where}: pattern {pattern[:60]!r} is refused: {reason}. "
            "Module paths need no more than literal text, classes and a few quantifiers."
        )


def _costly_part(pattern: str) -> str | None:
    """Return why `pattern` could take long to match, None if it cannot."""
    at = quantifiers = 0
    groups = [False]  # per open group: does it hold a quantifier or a choice so far?
    repeatable = True  # may the item just passed be repeated?
    while at < len(pattern):
        char = pattern[at]
        step, repeats = 1, None
        if char == "\\":
            if pattern[at + 1 : at + 2] in tuple("123456789"):
                return "it has a back-reference"
            step = 2
        elif char == "[" and (found := _CLASS.match(pattern, at)):
            step = found.end() - at
        elif char == "(":
            if pattern[at + 1 : at + 2] == "?" and pattern[at + 2 : at + 3] != ":":
                return "it has a group other than (...) and (?:...)"
            groups.append(False)
            step = 3 if pattern.startswith("(?:", at) else 1
        elif char == ")" and len(groups) > 1:
            inner = groups.pop()
            groups[-1] |= inner
            at, repeatable = at + 1, not inner
            continue
        elif char == "|":
            groups[-1] = True
        elif repeats := _QUANTIFIER.match(pattern, at):
            if not repeatable and char != "?":
                return "it repeats a group that holds a quantifier or a choice"
            quantifiers += 1
            groups[-1] = True
            step = repeats.end() - at
        at, repeatable = at + step, True
    if quantifiers > MAX_QUANTIFIERS:
        return f"it has {quantifiers} quantifiers, at most {MAX_QUANTIFIERS} are supported"
    return None
