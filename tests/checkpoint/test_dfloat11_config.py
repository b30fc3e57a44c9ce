"""dfloat11_config: its four keys, and patterns whose matching time is bounded."""

from typing import Any

import pytest
from dfloat11_helpers import config

from vllm_dfloat.checkpoint.patterns import compile_patterns
from vllm_dfloat.checkpoint.settings import parse_config
from vllm_dfloat.errors import DFloatError, FormatError, UnsupportedError


@pytest.mark.parametrize(
    "key",
    [
        r"model.layers.\d+",
        r"model\.layers\.\d+",
        r"model\.layers\.\d++",
        r"model\.layers\.(?:0|1[0-9]*)",
        r"model\.layers\.[0-9]{1,3}",
        r"(model|language_model)\.layers\.\d+",
    ],
)
def test_pattern_matches_the_whole_path(key: str) -> None:
    patterns = compile_patterns({key: ["a", "b"]}, "config.json")
    assert patterns.members("model.layers.0") == ("a", "b")
    assert patterns.members("model.layers.17") == ("a", "b")
    assert patterns.members("model.layers.17.mlp") is None
    assert patterns.members("my.model.layers.0") is None


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (r"(a+)+", "repeats a group that holds a quantifier"),
        (r"((a|b)*c)*", "repeats a group that holds a quantifier"),
        (r"(a|aa){2,}", "repeats a group that holds a quantifier or a choice"),
        (r"(?:(?:a?))*b", "repeats a group that holds a quantifier"),
        (r"[)](\d*)*", "repeats a group that holds a quantifier"),
        (r".*.*.*.*x", "4 quantifiers"),
        (r"a?a?a?a?aaaa", "4 quantifiers"),
        (r"(a)\1", "back-reference"),
        (r"(?=a)a", "a group other than"),
        (r"(?i)model", "a group other than"),
        ("a" * 300, "300 characters"),
    ],
)
def test_pattern_that_could_run_for_long_is_refused(key: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        compile_patterns({key: []}, "config.json: pattern_dict")


def test_costliest_accepted_pattern_ends_soon_on_the_longest_path() -> None:
    # Bug caught: a limit that is too high (with ten quantifiers this would run for hours).
    patterns = compile_patterns({".*.*.*x": []}, "config.json: pattern_dict")
    assert patterns.members("a" * 256) is None
    with pytest.raises(FormatError, match="257 characters"):
        patterns.members("a" * 257)


def test_broken_regex_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"pattern_dict: 'a\(' is not a regular expression"):
        compile_patterns({"a(": []}, "config.json: pattern_dict")


def test_patterns_that_disagree_about_a_unit_are_refused() -> None:
    patterns = compile_patterns({r"a\.\d": ["x"], r"a.0": ["y"]}, "config.json")
    with pytest.raises(FormatError, match="list different weights"):
        patterns.members("a.0")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": None}, FormatError, "version is None; a string"),
        ({"threads_per_block": [256]}, UnsupportedError, r"threads_per_block is \[256\]; \[512\]"),
        ({"threads_per_block": 512}, UnsupportedError, "threads_per_block is 512"),
        ({"bytes_per_thread": 16}, UnsupportedError, "bytes_per_thread is 16; 8"),
        ({"pattern_dict": []}, FormatError, "pattern_dict must be an object"),
        ({"pattern_dict": {"a": "b"}}, FormatError, "pattern_dict must be an object"),
        ({"pattern_dict": {"a": [1]}}, FormatError, "pattern_dict must be an object"),
        ({"extra": 1}, FormatError, "found .*'extra'.*is expected"),
    ],
)
def test_config_outside_the_format_is_refused(
    change: dict[str, Any], error: type[DFloatError], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_config({**config({}), **change}, "config.json: dfloat11_config")


def test_config_without_one_of_its_four_keys_is_refused() -> None:
    for key in config({}):
        rest = {name: value for name, value in config({}).items() if name != key}
        with pytest.raises(FormatError, match="version, threads_per_block, bytes_per_thread"):
            parse_config(rest, "config.json: dfloat11_config")
