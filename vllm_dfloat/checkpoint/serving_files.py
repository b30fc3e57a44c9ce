"""Which files beside a model's weights vLLM reads: they change its answers, though they hold no weights."""

from __future__ import annotations

import filecmp
import re
from pathlib import Path

from vllm_dfloat.checkpoint.side_files import visible_paths
from vllm_dfloat.checkpoint.side_weights import (
    MODULES_FILE,
    holds_or_names_weights,
    is_weights,
    module_folders,
)

# Directly in the model's folder; in folders below it, modules.json decides what is read. Not config.json, which is made
# anew, and read from nowhere else.
_READ = re.compile(
    r"""
    [^/]*_config\.json | config_\w+\.json          # generation, tokenizer, processors, sentence-transformers, adapters
    | params\.json | tekken\.json                  # Mistral's own config and tokenizer
    | (tokenizer|vocab)[^/]* | (spiece|spm|sentencepiece)[^/]*\.model | [^/]+\.tiktoken | merges\.txt
    | added_tokens\.json | special_tokens_map\.json
    | [^/]*chat_template[^/]*\.(json|jinja) | additional_chat_templates/[^/]+\.jinja
    | (configuration|modeling|tokenization|[a-z_]*processing|feature_extraction)_\w+\.py
    """,
    re.VERBOSE,
)


def is_served_beside(name: str) -> bool:
    """Return whether vLLM may read a file of this name, without weights, from the folder of a model."""
    return bool(_READ.fullmatch(name))


def changes_answers(name: str) -> bool:
    """Return whether a file of this name, beside a model's own, may change what vLLM makes of the model."""
    return holds_or_names_weights(name) or is_served_beside(name)


def served_differences(path: Path, against: Path) -> list[str]:
    """Return a sentence for each file that vLLM may read beside weights and that two folders do not have alike."""
    modules = module_folders(path) | module_folders(against)
    here, there = _served(path, modules), _served(against, modules)
    found = []
    for name in sorted(here | there):
        if name not in here or name not in there:
            found.append(f"{name}: only in {path if name in here else against}")
        elif not filecmp.cmp(path / name, against / name, shallow=False):
            found.append(f"{name}: other bytes in {path} than in {against}")
    return found


def _served(folder: Path, modules: frozenset[str]) -> set[str]:
    names = {
        name
        for name, _ in visible_paths(folder)
        if is_served_beside(name)
        or name == MODULES_FILE
        or (name.rpartition("/")[0] in modules and "/" in name and not is_weights(name))
    }
    return {name for name in names if (folder / name).is_file()}
