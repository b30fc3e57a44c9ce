"""Refused runs: options of vLLM, such as offload, that do not work with weights compressed while loading."""

from typing import Any


def refusal(config: Any) -> str | None:
    """Return why weights cannot be compressed while loading with this VllmConfig, or None if they can."""
    load_format = str(config.load_config.load_format)
    if load_format in ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache"):
        return (
            f"--load-format {load_format}: it restores a model's parameters as they were saved; expected a format "
            "that reads a checkpoint. Use auto, hf or safetensors."
        )
    return None
