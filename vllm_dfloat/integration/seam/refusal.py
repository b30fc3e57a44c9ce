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
    offload = getattr(config, "offload_config", None)
    uva = getattr(offload, "uva", None) or config.cache_config
    if getattr(uva, "cpu_offload_gb", 0) or getattr(uva, "cpu_offload_params", None):
        return (
            "--cpu-offload-gb: it moves parameters to the host before their weights have arrived; expected 0. "
            "Remove it: compressed weights take about 0.68 of the memory."
        )
    prefetch = getattr(offload, "prefetch", None)
    if getattr(prefetch, "offload_group_size", 0):
        return (
            "--offload-group-size: it moves parameters to the host before their weights have arrived; expected 0. "
            "Remove it."
        )
    return None
