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
    if _prefetches(getattr(config, "offload_config", None)) and _has_microbatches(config):
        return (
            "--offload-group-size with --enable-dbo: two microbatches run a layer at different times, and the copy for "
            "the next one would come between; expected one of the two. Use --cpu-offload-gb."
        )
    return None


def _prefetches(offload: Any) -> bool:
    """Return whether vLLM takes its prefetching offloader with this OffloadConfig, as its create_offloader decides."""
    backend = getattr(offload, "offload_backend", "")
    group = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    return bool(backend == "prefetch" or (backend == "auto" and group))


def _has_microbatches(config: Any) -> bool:
    return bool(getattr(getattr(config, "parallel_config", None), "use_ubatching", False))
