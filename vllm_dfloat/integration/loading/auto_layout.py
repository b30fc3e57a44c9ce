"""Layout "auto": the plan's choice of the layers that are held in the fast layout, from vLLM's settings."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.integration.seam import fused_names, layer_kinds, ranks
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.seam.options import Options

if TYPE_CHECKING:
    from vllm_dfloat.plan.settings import Settings


def choose_for(quant_config: Any, config: Any) -> tuple[frozenset[str], str]:
    """Return what `choose` does for a DFloat11Config, on all ranks that build its model."""
    fused, group = quant_config.packed_modules_mapping, ranks.that_load(config, quant_config)
    return choose(config, quant_config.options, fused, group)


def choose(
    config: Any,
    options: Options,
    fused: Mapping[str, list[str]] = MappingProxyType({}),
    group: ranks.Group | None = None,
) -> tuple[frozenset[str], str]:
    """Return the layers to hold in the fast layout, and a line that says how many, or why none.

    It is the choice of `vllm-dfloat plan --layout auto`: from config.json and the headers of the files, before anything
    is loaded. All ranks have that of the first, whose files count, for the GPU with the least memory.

    Args:
        config: vLLM's, whose memory, parallelism and lengths count.
        options: of dfloat11. Its kv_tokens must find room, and one request of --max-model-len.
        fused: vLLM's packed_modules_mapping, for names in the option `ignore`.
        group: the ranks that call this together; None for this one alone.
    """
    memory = ranks.least(ranks.device_memory(), group)
    layers, told, warnings = ranks.of_first(_planned(config, options, fused, memory), group)
    for warning in warnings:
        logger.warning("dfloat11: %s", warning)
    return layers, told


def _planned(
    config: Any, options: Options, fused: Mapping[str, list[str]], memory: int
) -> tuple[frozenset[str], str, list[str]]:
    """Return the choice of this rank for GPUs with so many bytes, a line on it, and warnings."""
    from vllm_dfloat.plan.plan import fast_layers

    model = config.model_config

    def stays_bf16(name: str) -> bool:
        return _is_read_as_head(name, model) or fused_names.is_ignored(name, options.ignore, fused)

    settings = _settings(config, options, memory)
    try:
        layers, told, warnings = fast_layers(str(model.model), settings, stays_bf16)
    except (DFloatError, OSError) as error:
        told = (
            f"auto: all layers are packed, since the plan is not known: {error} "
            'Or choose the layout yourself, "fast" or "packed".'
        )
        return frozenset(), told, []
    held, limit = config.cache_config.kv_cache_memory_bytes, ""
    if held is not None:  # on a CPU, vLLM puts the variable's GiB there
        limit = (
            f" Whatever there is room for, vLLM takes the {held:,} bytes of KV cache that --kv-cache-memory-bytes "
            "or VLLM_CPU_KVCACHE_SPACE asks for."
        )
    return layers, told, [f"{warning}.{limit}" for warning in warnings]


def _settings(config: Any, options: Options, memory: int) -> Settings:
    """Return what a plan is asked about, by vLLM's settings and the options, for GPUs with so many bytes."""
    from vllm_dfloat.plan.settings import Settings

    cache, parallel, scheduler = (
        config.cache_config,
        config.parallel_config,
        config.scheduler_config,
    )
    cpu_offload, prefetch = _offload(getattr(config, "offload_config", None))
    model = config.model_config
    # With --max-model-len auto, vLLM takes what fits.
    is_fitted = getattr(model, "original_max_model_len", None) == -1
    return Settings(
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        dp=parallel.data_parallel_size,
        gpu_memory=memory,
        gpu_memory_utilization=cache.gpu_memory_utilization,
        max_model_len=None if is_fitted else model.max_model_len,
        kv_cache_dtype=str(cache.cache_dtype),
        prefix_caching=cache.enable_prefix_caching,
        mamba_ssm_cache_dtype=str(cache.mamba_ssm_cache_dtype),
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        kv_cache_memory=None if options.kv_tokens else cache.kv_cache_memory_bytes,
        cpu_offload=cpu_offload,
        prefetch=prefetch,
        expert_parallel=parallel.enable_expert_parallel,
        layout="auto",
        kv_tokens=options.kv_tokens,
        mode=options.mode,
        granularity="block" if options.granularity == "block" else "layer",
        slab=options.slab
        if isinstance(options.slab, int)
        else {"auto": None, "off": 0}[options.slab],
    )


def _is_read_as_head(name: str, model_config: Any) -> bool:
    """Return whether vLLM reads a layer's BF16 weight as that of the LM head, to multiply in another dtype."""
    if layer_kinds.other_dtype_of_head(model_config) is None:
        return False
    last = name.rpartition(".")[2]
    return last == "lm_head" or (
        last == "embed_tokens" and layer_kinds.may_be_lm_head(model_config)
    )


def _offload(offload: Any) -> tuple[int, Any]:
    """Return the bytes of --cpu-offload-gb, and prefetching offload, of which vLLM takes one by its OffloadConfig."""
    from vllm_dfloat.plan.byte_sizes import GIB
    from vllm_dfloat.plan.offload import Prefetch

    given, backend = getattr(offload, "prefetch", None), getattr(offload, "offload_backend", "auto")
    if given is not None and given.offload_group_size and backend != "uva":
        return 0, Prefetch(
            given.offload_group_size,
            given.offload_num_in_group,
            given.offload_prefetch_step,
            frozenset(given.offload_params),
        )
    budget = (
        0 if backend == "prefetch" else getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    )
    return int(GIB * budget), Prefetch()
