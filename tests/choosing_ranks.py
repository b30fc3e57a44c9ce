"""Two ranks without an engine, with different memory and files, which choose the layers of layout "auto" together.

python choosing_ranks.py MODEL FOLDER: writes a file per rank, named after it, with JSON: what each choice came to.
"""

import json
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import conftest  # noqa: F401  # first: settings that must be made before vLLM is imported
import torch
from engines import SETTINGS, prepare_vllm
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform

from vllm_dfloat.integration.config import DFloat11Config
from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.loading.auto_layout import choose
from vllm_dfloat.integration.seam.options import Options

NUM_RANKS = 2
LLAMA = Path(__file__).parent / "data" / "configs" / "Llama-3.1-8B.json"
MEMORY = [24 << 30, 22 << 30]  # of the GPUs of a node
AUTO = {"dfloat11": {"layout": "auto", "kv_tokens": 1}}


def memory_of(rank: int) -> Any:
    """Let vLLM's platform tell of the memory of a rank's GPU where it is asked without a number."""
    return mock.patch.object(
        current_platform,
        "get_device_total_memory",
        lambda device_id=rank: MEMORY[device_id],
    )


def choices(rank: int, config: Any) -> dict[str, Any]:
    """Return the choices for a large model, as those of ranks on one node with GPUs."""
    options, world = Options(layout="auto", kv_tokens=60_000), parallel_state.get_world_group()

    def chosen(is_there: bool = True, group: Any = world.cpu_group) -> Any:
        model = str(LLAMA) if is_there else "missing"
        of_model = SimpleNamespace(model=model, max_model_len=8192, dtype=None)
        # vLLM builds models where the GPU is the default device.
        with torch.device("meta"):
            layers, line = choose(
                SimpleNamespace(**{**vars(config), "model_config": of_model}), options, group=group
            )
        return sorted(layers), line

    is_gpu = mock.patch.object(current_platform, "is_cuda_alike", return_value=True)
    with is_gpu, memory_of(0):
        return {
            "alone": chosen(group=None),
            "together": chosen(),
            "without the first's files": chosen(is_there=rank == 1),
            "without the second's files": chosen(is_there=rank == 0),
        }


def loaded(rank: int, config: Any) -> dict[str, str]:
    """Return how a model's layers are held if the second rank has no room at all."""
    MEMORY[1] = 1 << 20
    with memory_of(rank):
        model = get_model(vllm_config=config)
        if rank == 1:  # as a draft of the last stage, for which no other rank comes
            DFloat11Config(Options(layout="auto")).start()
    return {
        name: layer.quant_method.asked_layout
        for name, layer in model.named_modules()
        if weights_of(layer)
    }


def run(rank: int, model: str, folder: Path) -> None:
    config = EngineArgs(
        model=model, quantization="dfloat11", additional_config=AUTO, enforce_eager=True, **SETTINGS
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(
            NUM_RANKS, rank, f"file://{folder}/store", rank, backend="gloo"
        )
        initialize_model_parallel(1, 1)  # each builds the whole model
        found = {**choices(rank, config), "loaded": loaded(rank, config)}
    torch.distributed.barrier()
    (folder / str(rank)).write_text(json.dumps(found))


def main(model: str, folder: Path) -> int:
    """Run both ranks, as children of this process, which has imported vLLM for them."""
    prepare_vllm()
    torch.accelerator.empty_cache = lambda: None  # as in vLLM's CPU worker
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run, args=(rank, model, folder)) for rank in range(NUM_RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
