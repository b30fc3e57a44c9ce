"""Whether a DFloat11 checkpoint without a manifest is whole, as far as its config and its patterns tell.

Nothing in the format lists the files or tensors of a checkpoint, so one without a layer looks like a smaller model.
`model_class.missing_parameters` asks the model class; nothing here does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.checkpoint.patterns import Patterns
from vllm_dfloat.checkpoint.tied import may_be_embedding, ties_embeddings
from vllm_dfloat.errors import FormatError, shown

Names = Collection[str]

# Lists of transformer blocks, numbered without gaps. Other lists (`mlp.0`, `mlp.2`) may have gaps.
_LAYER_LIST = re.compile(r"layers?|h|\w*blocks?|\w*refiner")
_ONE_MODULE = re.compile(r"[\w.]+")
_ALL_LAYERS = re.compile(r"([\w.]+)\.\\d\+\+?")
# The transformer blocks that config.json counts, if a model has several lists of them.
_TEXT_LAYERS = (
    "model.layers", "transformer.h", "model.language_model.layers", "language_model.model.layers",
)  # fmt: skip
_TOWERS = re.compile(r"vis|audio|speech|encoder")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LANGUAGE_MODEL = re.compile(r"For(CausalLM|ConditionalGeneration)$")
_NORM = re.compile(r"norm|(^|[._])ln[._]")
_HEAD = re.compile(r"head|output|embed_out|proj_out")


def refuse_gaps(path: Path, config: Mapping[str, Any], patterns: Patterns, names: Names) -> None:
    """Refuse a checkpoint that lacks a transformer block, or a language model that lacks its embedding, norm or head.

    Args:
        path: its folder.
        config: its config.json.
        patterns: its `pattern_dict`.
        names: of all tensors, those of units under their original names.

    Raises:
        FormatError: something is missing; the message names it.
    """
    may_have_gaps = bool(config.get("block_configs"))  # pruned: some blocks have no tensor left
    modules = _modules(names)
    for key, _ in patterns.entries:
        _check_key(path, key.pattern.replace(r"\.", "."), may_have_gaps, modules)
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    count = next((text[key] for key in _LAYER_COUNTS if type(text.get(key)) is int), None)
    stack = _text_layers(modules)
    if stack is None or count is None:
        return
    if not may_have_gaps:
        _refuse_gap(path, stack, modules[stack], count)
    architectures = config.get("architectures")
    if isinstance(architectures, list) and any(
        isinstance(name, str) and _LANGUAGE_MODEL.search(name) for name in architectures
    ):
        _check_ends(path, config, text, stack, names)


def _modules(names: Names) -> dict[str, set[int]]:
    """Return the path of every module -> the numbers among the names directly below it."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            numbers = found.setdefault(".".join(parts[:i]), set())
            if parts[i].isdecimal():
                numbers.add(int(parts[i]))
    return found


def _check_key(path: Path, key: str, may_have_gaps: bool, modules: Mapping[str, set[int]]) -> None:
    """Refuse a pattern for one module that is missing, or for all blocks of a list that has gaps.

    Args:
        key: the pattern, with its dots unescaped.
    """
    if _ONE_MODULE.fullmatch(key) and key not in modules:
        _refuse(path, f"no tensor of {key}, which is a key of pattern_dict")
    found = _ALL_LAYERS.fullmatch(key)
    if found and _LAYER_LIST.fullmatch(found.group(1).rpartition(".")[2]):
        numbers = modules.get(found.group(1))
        if not numbers:
            _refuse(path, f"no tensor of {found.group(1)}.0, which a key of pattern_dict matches")
        if not may_have_gaps:
            _refuse_gap(path, found.group(1), numbers, max(numbers) + 1)


def _refuse_gap(path: Path, layer_list: str, numbers: set[int], count: int) -> None:
    """Refuse a list of blocks that lacks one of the numbers from 0 to count - 1."""
    ordered = sorted(numbers)
    missing = next((i for i, number in enumerate(ordered) if i != number), len(ordered))
    if missing < count:
        _refuse(path, f"no tensor of {layer_list}.{missing}, one of {shown(count)} such blocks")


def _text_layers(modules: Mapping[str, set[int]]) -> str | None:
    """Return the list of transformer blocks that config.json counts, None if that is not certain."""
    found = [
        path
        for path, numbers in modules.items()
        if numbers
        and _LAYER_LIST.fullmatch(path.rpartition(".")[2])
        and not any(part.isdecimal() for part in path.split("."))  # within a block
    ]
    usual = [path for path in _TEXT_LAYERS if path in found]
    likely = usual or [path for path in found if not _TOWERS.search(path)]
    return likely[0] if len(likely) == 1 else None


def _check_ends(
    path: Path, config: Mapping[str, Any], text: Mapping[str, Any], stack: str, names: Names
) -> None:
    """Refuse a language model that lacks what comes before or after its transformer blocks."""
    inside = [name for name in names if name.startswith(f"{stack}.")]
    outside = [
        name for name in names if not name.startswith(f"{stack}.") and not _TOWERS.search(name)
    ]
    if not any(map(may_be_embedding, outside)):
        _refuse(path, "no tensor of an embedding")
    has_last_norm = any(map(_NORM.search, inside)) and text.get("do_layer_norm_before", True)
    if has_last_norm and not any(map(_NORM.search, outside)):
        _refuse(path, "no tensor of the norm after the last block")
    if ties_embeddings(config) is False and not any(map(_HEAD.search, outside)):
        _refuse(path, "no tensor of an LM head, and tie_word_embeddings is false")


def _refuse(path: Path, what: str) -> NoReturn:
    raise FormatError(
        f"{path}: {what}; expected the whole model that config.json describes. A weight file is missing, or is of "
        "another model: fetch the checkpoint again."
    )
