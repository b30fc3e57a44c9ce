"""What differs between the supported vLLM versions, and private names of vLLM that we need; GEMMs are in gemms.py."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from vllm_dfloat.integration.seam.names import logger

OLDEST = (0, 28)
NEWEST_EXCLUDED = (0, 34)


def warn_if_untested_version() -> None:
    """Log one line if this vLLM is outside the range that the plugin was tested with."""
    import vllm
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(vllm.__version__).release[:2]
    except InvalidVersion:
        release = (0, 0)
    if not OLDEST <= release < NEWEST_EXCLUDED:
        logger.warning(
            "dfloat11: vLLM %s is outside the tested range >=%d.%d,<%d.%d",
            vllm.__version__,
            *OLDEST,
            *NEWEST_EXCLUDED,
        )


def let_numba_be_scanned() -> None:
    """Prevent a crash of vLLM's CPU worker in the next engine of this process, after numba was imported.

    The worker (0.32) calls vars() on every attribute of every module. llvmlite's library handle returns a function for
    any attribute, also for `__dict__`, unless its table of functions already has an entry of that name.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    table = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})


def current_config() -> Any | None:
    """Return the VllmConfig of the model under construction, if there is one."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def quant_config_of(vllm_config: Any, model_config: Any) -> Any:
    """Return the quantization config of a model: the VllmConfig's or, for a draft with one of its own, a new one."""
    config = vllm_config.quant_config
    if config is not None and config.get_name() == model_config.quantization:
        return config
    return type(vllm_config).get_quantization_config(model_config, vllm_config.load_config)


def as_current(config: Any) -> AbstractContextManager[Any]:
    """Return a context in which this VllmConfig is vLLM's current one."""
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(config)  # type: ignore[no-any-return]


def is_ignored(name: str, ignore: Iterable[str], fused: Mapping[str, list[str]]) -> bool:
    """Return whether `ignore` matches the layer, by the rules of vLLM's online quantization.

    Raises:
        ValueError: it matches some parts of a fused layer, and not the others.
    """
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        should_ignore_layer,
    )

    known = inspect.signature(should_ignore_layer).parameters
    globs = {"use_fnmatch": True} if "use_fnmatch" in known else {}
    return bool(should_ignore_layer(name, ignore=tuple(ignore), fused_mapping=fused, **globs))


def touches(name: str, entry: str, fused: Mapping[str, list[str]]) -> bool:
    """Return whether an entry of `ignore` matches the layer or, for a fused layer, one of its parts."""
    try:
        return is_ignored(name, [entry], fused)
    except ValueError:  # some parts, and not the others
        return True


def is_compiled_for_gpu(config: Any) -> bool:
    """Return whether Inductor will compile the model of this VllmConfig for a GPU."""
    from vllm.platforms import current_platform

    compilation = config.compilation_config
    is_eager = int(compilation.mode or 0) == 0 or compilation.backend not in ("", "inductor")
    return bool(current_platform.is_cuda_alike()) and not is_eager


def inductor_times_kernels(options: Mapping[str, Any]) -> bool:
    """Return whether Inductor with these options chooses, by timing, between kernels that give different bits."""
    from torch._inductor import config

    if not options.get("deterministic", getattr(config, "deterministic", False)):
        return True
    return bool(options.get("combo_kernels") and options.get("benchmark_combo_kernel"))


def inductor_keeps_biases(options: Mapping[str, Any]) -> bool:
    """Return whether Inductor with these options keeps a bias in the GEMM, as eager mode does."""
    from torch._inductor import config

    name = "keep_addmm_fused_for_half_dtypes"
    return bool(options.get(name, getattr(config, name, False)))


def tunes_single_sizes() -> bool:
    """Return whether vLLM lets Inductor tune graphs that are compiled for a single batch size."""
    from vllm import envs

    return bool(
        envs.VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE
        or envs.VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING
    )


def process_when_complete(layer: torch.nn.Module) -> None:
    """Ask vLLM to call process_weights_after_loading as soon as the layer's last weight has arrived."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing

    initialize_online_processing(layer)


def process_at_the_end(layer: torch.nn.Module) -> None:
    """Undo `process_when_complete`, for a layer that gets the parameter of another one."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    get_layerwise_info(layer).reset()


def created_anew(layer: Any) -> None:
    """Tell vLLM of the new parameters of an embedding or LM head that had others when the model was built."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta

    get_layerwise_info(layer).restore_metadata = capture_layer_to_meta(layer)
    if hasattr(layer, "use_fused_embedding"):  # since 0.30: a kernel that reads the BF16 weight
        layer.use_fused_embedding = False


def model_device() -> torch.device:
    """Return the device that vLLM runs models on in this process."""
    from vllm.platforms import current_platform

    return torch.device(current_platform.device_type)


def is_elsewhere(name: str, model: torch.nn.Module) -> bool:
    """Return whether a tensor of the checkpoint belongs to a layer on another pipeline stage."""
    from vllm.model_executor.models.utils import is_pp_missing_parameter

    return bool(is_pp_missing_parameter(name, model))


def is_last_stage() -> bool:
    """Return whether this process runs the last pipeline stage, which has the LM head."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def is_gate(layer: torch.nn.Module) -> bool:
    """Return whether the layer is a router with its own GEMMs, which vLLM uses only if the layer is unquantized."""
    return any(cls.__name__ == "GateLinear" for cls in type(layer).__mro__)


def is_read_by_latent_attention(name: str) -> bool:
    """Return whether the layer is the kv_b_proj of vLLM's latent attention (MLA), whose weight the attention reads.

    vLLM keeps views of the BF16 weight. Of a compressed one it would keep a decoded copy, with other strides, for which
    its matrix products may take other kernels.
    """
    model = getattr(current_config(), "model_config", None)
    return bool(getattr(model, "use_mla", False)) and name.rpartition(".")[2] == "kv_b_proj"


def holds_a_matrix(layer: torch.nn.Module) -> bool:
    """Return whether the layer is one of vLLM's linear layers, vocabulary embeddings or LM heads."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(layer, LinearBase | VocabParallelEmbedding)


def num_padding(layer: torch.nn.Module, weight: torch.Tensor) -> int:
    """Return the number of padding elements of a layer's weight: the vocabulary rows that no checkpoint has."""
    shard: Any = getattr(layer, "shard_indices", None)
    return 0 if shard is None else (weight.shape[0] - shard.num_org_elements) * weight.shape[1]


def check_loaded(model: torch.nn.Module, loaded: set[str] | None, config: Any) -> None:
    """Run vLLM's check of unquantized models: raise ValueError if parameters have not been loaded."""
    from vllm.model_executor.model_loader import get_model_loader

    if loaded is not None:
        get_model_loader(config.load_config).track_weights_loading(model, loaded)
