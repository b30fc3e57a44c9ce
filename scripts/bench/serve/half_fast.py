"""The variant `auto`: the KV cache to ask for, so that layout "auto" holds about half of a model's matrices fast."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Choice = tuple[frozenset[str], str]  # the layers that are fast, and the plan's sentence about it


def is_wanted(settings: Json) -> bool:
    """Return whether the arguments of vLLM choose layout "auto" without saying for how many tokens."""
    options = settings.get("additional_config", {}).get("dfloat11", {})
    return options.get("layout") == "auto" and "kv_tokens" not in options


def with_half_fast(model: str | Path, settings: Json) -> tuple[Json, str]:
    """Return the arguments of vLLM with `kv_tokens` for layout "auto", and the plan's sentence on the choice.

    Raises:
        ValueError: no matrix can be fast; the plan's reason.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dfloat.integration.loading import auto_layout
    from vllm_dfloat.integration.seam.names import logger
    from vllm_dfloat.integration.seam.options import Options

    config = EngineArgs(model=str(model), **settings).create_engine_config()
    options = settings["additional_config"]["dfloat11"]

    def choose(wish: int) -> Choice:
        given = {**options, "kv_tokens": wish}
        return auto_layout.choose(config, Options().updated(given, "additional_config"))

    level = logger.level
    logger.setLevel(logging.ERROR)  # wishes that are only tried are no news
    try:
        tokens, told = halving(choose)
    finally:
        logger.setLevel(level)
    return {**settings, "additional_config": {"dfloat11": {**options, "kv_tokens": tokens}}}, told


def halving(choose: Callable[[int], Choice]) -> tuple[int, str]:
    """Return the fewest tokens at which no more than half of the layers are fast, and the sentence on them.

    Half of those, that is, that are fast where one token needs room.

    Args:
        choose: tokens that need room -> the choice.
    """
    layers, told = choose(1)
    if not layers:
        raise ValueError(told)
    fewer, more = 1, 2
    while 2 * len(choose(more)[0]) > len(layers):
        fewer, more = more, 2 * more
    while more - fewer > 1:
        middle = (fewer + more) // 2
        if 2 * len(choose(middle)[0]) > len(layers):
            fewer = middle
        else:
            more = middle
    return more, choose(more)[1]
