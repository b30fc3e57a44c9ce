"""The fewest instructions of SASS that a thread executes, where rare paths are not taken.

A product with the fast layout jumps over the code for escapes and raw tiles where a tile has none, and so does a
decoder. What a turn or a program executes then is the shortest path that does all of the work: every multiplication of
a turn, or every wide store of a program. It has no fewer instructions than that, and branches that depend on each other
may make it more. Predicated instructions count, functions that are called do not.
"""

import heapq
import re
from collections.abc import Iterable
from itertools import pairwise

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"(0x[0-9a-f]+)$")
_MULTIPLIES = re.compile(r"(HMMA|HGMMA|UTCHMMA|FFMA)")
_ENDS = ("EXIT", "RET", "BPT.TRAP", "KILL")
_WIDE_STORES = re.compile(r"STG\.E\.(EF\.)?128")

Loop = tuple[int, int]  # the addresses of its first and last instructions
Graph = dict[int, list[int]]


def graph_of(sass: str) -> tuple[Graph, dict[int, str]]:
    """Return which instructions may follow each, and their text."""
    lines = [(int(at, 16), guard, text) for at, guard, text in _LINE.findall(sass)]
    texts = {at: text for at, _, text in lines}
    following: Graph = {}
    for (at, guard, text), (after, _, _) in pairwise([*lines, (-1, "", "")]):
        name = text.split()[0]
        found = [] if name.startswith(_ENDS) else [after]
        target = _TARGET.search(text)
        if name.startswith(("BRX", "JMX")):
            raise ValueError(f"{text}: where it goes is not known")
        if name.startswith("BRA") and target:
            is_certain = not guard and text.split() == [name, target[1]]
            found = [int(target[1], 16)] if is_certain else [after, int(target[1], 16)]
        elif guard:
            found = [after]
        following[at] = [one for one in found if one >= 0]
    return following, texts


def turn(sass: str, loops: Iterable[Loop]) -> int | None:
    """Return the fewest instructions of a turn of the loop that multiplies; None if there is none.

    Args:
        loops: those that are in no other.
    """
    following, texts = graph_of(sass)
    for loop in loops:
        if work := _within(texts, loop, _MULTIPLIES):
            return _turn(following, texts, loop, work)
    return None


def program(sass: str, loops: Iterable[Loop], stores: int) -> int | None:
    """Return the fewest instructions of a program that decodes; None if it is not known which of them do.

    Args:
        loops: all loops.
        stores: wide stores that a program executes; with fewer in its code, a loop has some of them.
    """
    following, texts = graph_of(sass)
    work = _within(texts, (0, max(texts)), _WIDE_STORES)
    repeated = {loop: found for loop in loops if (found := _within(texts, loop, _WIDE_STORES))}
    extra = 0
    if len(work) != stores:
        if len(repeated) != 1:
            return None
        ((loop, stored),) = repeated.items()
        turns, rest = divmod(stores - len(work) + len(stored), len(stored))
        once = _turn(following, texts, loop, stored)
        if rest or once is None:
            return None
        extra = (turns - 1) * once
    ends = [at for at, text in texts.items() if text.startswith("EXIT")]
    ways = (_through(following, texts, [min(texts), *work, end]) for end in ends)
    found = [way for way in ways if way is not None]
    return min(found) + extra if found else None


def _within(texts: dict[int, str], loop: Loop, kind: re.Pattern[str]) -> list[int]:
    return [at for at, text in texts.items() if loop[0] <= at <= loop[1] and kind.match(text)]


def _turn(following: Graph, texts: dict[int, str], loop: Loop, work: list[int]) -> int | None:
    inside = {at: text for at, text in texts.items() if loop[0] <= at <= loop[1]}
    within = {at: [after for after in following[at] if after in inside] for at in inside}
    return _through(within, inside, [loop[0], *work, loop[1]])


def _through(following: Graph, texts: dict[int, str], places: list[int]) -> int | None:
    """Return the fewest instructions from the first to the last of `places`, both counted, by all others in order."""
    total = 1
    for begin, end in pairwise(places):
        steps = _distance(following, texts, begin, end)
        if steps is None:
            return None
        total += steps
    return total


def _distance(following: Graph, texts: dict[int, str], begin: int, end: int) -> int | None:
    """Return the fewest instructions from `begin`, which is not counted, to `end`; NOPs are not counted."""
    least, waiting = {begin: 0}, [(0, begin)]
    while waiting:
        steps, at = heapq.heappop(waiting)
        if at == end:
            return steps
        for after in following[at]:
            sum_ = steps + (texts[after] != "NOP")
            if sum_ < least.get(after, sum_ + 1):
                least[after] = sum_
                heapq.heappush(waiting, (sum_, after))
    return None
