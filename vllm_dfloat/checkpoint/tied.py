"""Whether the LM head of a model is its embedding, as far as its config and the names of its tensors say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TIED_KEY = "tie_word_embeddings"
_EMBEDDING = re.compile(r"emb(?!.*inv_freq)|wte")


def tying_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that decides: the whole, if it has the entry, or else its text_config.

    vLLM decides so: what a multimodal config says it writes over what its text_config says.
    """
    if TIED_KEY in config:
        return config
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else {}


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Return what a config.json says, None if it says neither true nor false."""
    said = tying_config(config).get(TIED_KEY)
    return said if isinstance(said, bool) else None


def is_lm_head(name: str) -> bool:
    """Return whether a tensor belongs to an LM head."""
    return "lm_head" in name.split(".")


def may_be_embedding(name: str) -> bool:
    """Return whether a tensor of this name may be that of an embedding of tokens."""
    return bool(_EMBEDDING.search(name))
