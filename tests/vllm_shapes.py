"""Build vLLM's own models on the meta device, in any size, and write what each of their ranks would hold.

A script, because vLLM is told of more ranks than exist: python vllm_shapes.py RUNS.json ANSWERS.json
Nothing is loaded or computed, so a model of 671 billion parameters takes seconds.
"""

import importlib.abc
import importlib.machinery
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import cached_models
import gpu_only_models
import torch

if __name__ == "__main__":  # not for the tests that import a constant from here
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
BATCHED_TOKENS = 2048
DTYPES = {torch.bfloat16: 2, torch.float32: 4}


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes torchvision importable if it is not installed: image processors import it, and none is used here."""

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = self.Anything(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def start(folder: Path) -> None:
    """Prepare vLLM in this process; `folder` is for the rendezvous file of the ranks."""
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs  # noqa: F401  # imports all that looks for torchvision
    from vllm.model_executor.models import registry

    sys.meta_path.append(_Absent())
    # In this process: another one would not have the settings above.
    info = registry._ModelInfo.from_model_cls
    registry._LazyRegisteredModel.inspect_model_cls = lambda model: info(model.load_model_cls())
    # Without it vLLM disables prefix caching for latent attention, and then refuses the block size that it has set.
    torch.cpu._is_amx_tile_supported = lambda: True
    gpu_only_models.start()
    cached_models.register()
    parallel_state.init_distributed_environment(1, 0, f"file://{folder}/ranks", 0, backend="gloo")


def held(model: str, tp: int, pp: int, stage: int, room: int = 0) -> dict[str, Any]:
    """Return what rank 0 of a pipeline stage holds, for the model whose config.json is in folder `model`.

    Returns:
        weights: vLLM's name -> [shape, bytes per number, whether it is compressed]; tables: bytes of rotary tables;
        caches: layer -> [bytes per token, tokens in its window, whether the window is a chunk]; states: layer -> bytes
        of its state, without what pads it; context: in tokens;
        tokens: how many fit into `room` bytes of cache, by vLLM (one pipeline stage only); block_size: in tokens.
    """
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    settings: dict[str, Any] = dict(load_format="dummy", dtype="bfloat16", enforce_eager=True)
    settings |= dict(skip_tokenizer_init=True, max_num_batched_tokens=BATCHED_TOKENS)
    arguments = EngineArgs(model=model, quantization="dfloat11", **settings)
    config = arguments.create_engine_config()
    config.parallel_config.tensor_parallel_size, config.parallel_config.pipeline_parallel_size = tp, pp  # fmt: skip
    rotary_embedding._ROPE_DICT.clear()  # tables of the model before
    with set_current_vllm_config(config):
        parallel_state.destroy_model_parallel()  # only models with experts get an expert group
        parallel_state.initialize_model_parallel(1, 1)
        groups = (
            (parallel_state.get_tp_group(), tp, 0),
            (parallel_state.get_pp_group(), pp, stage),
        )
        for group, size, rank in groups:
            group.world_size, group.rank_in_group, group.rank = size, rank, rank
            group.ranks = list(range(size))
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            built = initialize_model(vllm_config=config, prefix="")
        if config.model_config.is_hybrid:
            current_platform.update_block_size_for_backend(config)  # an executor calls it
        layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
        tokens = _tokens(config, specs, room) if room else None
    tables = [table for name, table in built.named_buffers() if name.endswith("cos_sin_cache")]
    return {
        "weights": {name: _entry(built, name, value) for name, value in built.named_parameters()},
        "tables": sum(table.nbytes for table in tables),
        "caches": {name: _cache(spec) for name, spec in specs.items()},
        "states": {name: _state(spec) for name, spec in specs.items() if hasattr(spec, "shapes")},
        "context": config.model_config.max_model_len,
        "tokens": tokens,
        "block_size": config.cache_config.block_size,
    }


def _tokens(config: Any, specs: dict[str, Any], room: int) -> int:
    from vllm.v1.core import kv_cache_utils

    config.cache_config.kv_cache_layout = "LBNHC"  # the engine's choice; no number depends on it
    caches = kv_cache_utils.get_kv_cache_configs(config, [specs], [room])
    scheduled = kv_cache_utils.generate_scheduler_kv_cache_config(caches)
    tokens, _ = kv_cache_utils.get_kv_cache_capacity(config, scheduled)
    return int(tokens)


def _entry(model: torch.nn.Module, name: str, weight: torch.Tensor) -> list[Any]:
    from vllm_dfloat.integration.seam import layer_kinds
    from vllm_dfloat.integration.seam.names import ASKED

    module = model.get_submodule(name.rpartition(".")[0])
    method = type(getattr(module, "quant_method", None)).__name__
    # Without weights, an embedding that vLLM builds unasked has no method of ours yet; test_unasked_layers.py has that.
    is_unasked = layer_kinds.is_vocabulary(module) and ASKED not in module.__dict__
    is_compressed = (is_unasked or method.startswith("DFloat11")) and name.endswith(
        (".weight", ".w13_weight", ".w2_weight")
    )
    return [list(weight.shape), DTYPES[weight.dtype], is_compressed]


def _cache(spec: Any) -> list[Any]:
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    is_chunk = type(spec).__name__ == "ChunkedLocalAttentionSpec"
    return [spec.page_size_bytes // spec.block_size, window, is_chunk]


def _state(spec: Any) -> int:
    shapes = zip(spec.shapes, spec.dtypes, strict=True)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def main(runs: str, result: str) -> None:
    start(Path(result).parent)
    answers = [held(**run) for run in json.loads(Path(runs).read_text())]
    Path(result).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
