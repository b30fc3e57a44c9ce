"""Names, patterns and values that a fuzz run writes in place of expected ones."""

from __future__ import annotations

from random import Random
from typing import Any

PATHS = (
    "../config.json", "/etc/passwd", "a/../../b", ".", "..", "", "x" * 5000, "a\0b", "a\nb", "\ud800", "\x1b[31m",
    "//", "é", "C:\\windows", "model.safetensors/", "./model.safetensors", "~", "-",
)  # fmt: skip
TENSOR_NAMES = (
    *PATHS, "layers." + "9" * 5000 + ".weight", "layers.\u0663.weight", "a." * 3000 + "weight", ".weight", "weight",
    ".luts", "luts", "x.luts", "..gaps", "__metadata__", "a..b.weight", "lm_head.weight", "1.2.3.weight",
)  # fmt: skip
REGEXES = (
    "(a+)+$", "(?:a|aa)" * 30, "(?:.|..)" * 20 + "x", ".*.*.*x", ".*" * 100, "(" * 100 + ")" * 100, "(?:" * 400,
    "[", "\\", "a{99999}", "a{2}{3}", "(?P<x>a)(?P=x)", "(?=a)", "(?i)a", "\\1", "a" * 5000, ".*|.*|.*",
    "(?:a?){9}", "\\d+" * 3, "", "(?:(?:(?:a|b)?|c)?|d)?" * 9, "[a-\\d]", "\ud800", "\0", "x{4294967296}", ".*", ".+",
    "(?s:.)", "(?#", "[[:alpha:]]",
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def absurd(rng: Random) -> Any:
    """Return a value that no reader expects."""
    return rng.choice(
        (
            1 << 62, 1 << 63, 1 << 64, 10**400, -1, 0, 1, 0.5, 1e308, True, False, None, float("nan"), float("inf"),
            "", "8", "x" * 3000, "\ud800", "a\nb", [], {}, [1] * 300, [[]], {"a": {}}, nested(50), nested(400),
            [-1], [1.0, 2],
        )
    )  # fmt: skip
