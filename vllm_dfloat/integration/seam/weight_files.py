"""The files of a checkpoint as vLLM's loader finds, orders and reads them."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch


def checkpoint_files(
    loader: Any, model_config: Any, model: torch.nn.Module
) -> tuple[Path, list[Path]]:
    """Return the local folder, downloaded by vLLM if needed, and the weight files in the order in which vLLM reads."""
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    wanted = {
        "model_name_or_path": model_config.model,
        "subfolder": None,
        "revision": model_config.revision,
        "fall_back_to_pt": getattr(model, "fall_back_to_pt_during_load", True),
        "allow_patterns_overrides": getattr(model, "allow_patterns_overrides", None),
    }
    known = inspect.signature(loader._prepare_weights).parameters
    folder, files, *_ = loader._prepare_weights(**{k: v for k, v in wanted.items() if k in known})
    if not (Path(folder) / "config.json").exists() and not Path(model_config.model).exists():
        download_dir = loader.load_config.download_dir
        patterns = ["config.json"]
        download_weights_from_hf(model_config.model, download_dir, patterns, model_config.revision)
    return Path(folder), sorted(map(Path, files), key=lambda file: natural(file.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Return vLLM's sort key for file names: model-2 comes before model-10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def reads_lazily(load_config: Any) -> bool:
    """Return whether vLLM maps safetensors files into memory, so that they are read on first access."""
    if str(load_config.load_format) not in ("auto", "hf", "safetensors"):
        return False
    if (load_config.model_loader_extra_config or {}).get("enable_multithread_load"):
        return False
    return getattr(load_config, "safetensors_load_strategy", None) in (None, "lazy")


def reads_all_files(loader: Any, model: torch.nn.Module) -> bool:
    """Return whether vLLM reads every tensor of the files of `checkpoint_files`, and no other files."""
    filters = (
        getattr(loader, "_encoder_only_lm_prefixes", None),
        getattr(model, "is_unused_checkpoint_weight", None),
        getattr(model, "secondary_weights", None),
    )
    return not any(filters)
