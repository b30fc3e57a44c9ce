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
    if _prefetches(getattr(config, "offload_config", None)):
        return (
            "--offload-backend prefetch (--offload-group-size): it copies parameters of fixed size into buffers on the "
            "GPU; expected UVA, which reads compressed weights where they are. Use --cpu-offload-gb, which counts "
            "compressed bytes."
        )
    return None


def _prefetches(offload: Any) -> bool:
    """Return whether vLLM takes its prefetching offloader with this OffloadConfig, as its create_offloader decides."""
    backend = getattr(offload, "offload_backend", "")
    group = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    return bool(backend == "prefetch" or (backend == "auto" and group))
