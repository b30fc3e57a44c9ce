"""Load models with vLLM's own loaders, without an engine: no KV cache, no sampling, a fraction of the time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from engines import SETTINGS, prepare_vllm


@contextmanager
def group_of_one() -> Iterator[None]:
    """Stand where vLLM's worker stands, in process groups of one rank, and leave without a collection of garbage."""
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    try:
        with TemporaryDirectory() as folder:
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
            initialize_model_parallel(1, 1)
            yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


@contextmanager
def loaded(model: Path, is_draft: bool = False, **settings: Any) -> Iterator[torch.nn.Module]:
    """Give the model that an engine with these settings would serve, on one rank, or the one that drafts for it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.model_loader import get_model

    prepare_vllm()
    gc.freeze()  # vLLM collects garbage at each load: four fifths of the time, if all modules were looked through
    given = {**SETTINGS, "enforce_eager": True, **settings}
    config = EngineArgs(model=str(model), **given).create_engine_config()
    empty_cache, torch.accelerator.empty_cache = torch.accelerator.empty_cache, lambda: None
    try:
        with set_current_vllm_config(config), group_of_one():
            drafter = config.speculative_config.draft_model_config if is_draft else None
            yield get_model(vllm_config=config, model_config=drafter)
    finally:
        _ROPE_DICT.clear()  # else a traced engine takes these tables, which belong to eager mode
        torch.accelerator.empty_cache = (
            empty_cache  # as in vLLM's CPU worker, which has no accelerator
        )
