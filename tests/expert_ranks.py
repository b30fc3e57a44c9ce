"""One of two data-parallel ranks that share experts whole, in a process of its own; BF16, then compressed.

    python expert_ranks.py MODEL RANK PORT ANSWER.json      # PORT is free, and the same for both

Real process groups of two ranks, without engines: vLLM's loader, and what a rank then holds.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  # first: settings that must be made before vLLM is imported
import torch
from engines import SETTINGS, prepare_vllm
from expert_layers import DFLOAT11, experts_of, values

from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.seam import layer_kinds


def config_of(model: str, rank: int, port: int, **settings: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=model, enforce_eager=True, data_parallel_size=2, data_parallel_rank=rank, enable_expert_parallel=True,
        data_parallel_address="127.0.0.1", data_parallel_rpc_port=port + 1, **SETTINGS, **settings,
    ).create_engine_config()  # fmt: skip
    # What the front end of an engine would set; a rank alone would choose a port of its own.
    parallel = config.parallel_config
    parallel.data_parallel_size, parallel.data_parallel_rank = 2, rank
    parallel.data_parallel_master_ip, parallel.data_parallel_master_port = "127.0.0.1", port
    parallel._data_parallel_master_port_list = []
    return config


def held(layer: Any) -> dict[str, Any]:
    bits = [value.contiguous().view(torch.int16).numpy().tobytes() for value in values(layer)]
    return {
        "experts": layer_kinds.local_experts(layer),
        "bits": [hashlib.sha256(each).hexdigest() for each in bits],
        "compressed": len(weights_of(layer)),
    }


def main(model: str, rank: int, port: int, answer: Path) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model

    prepare_vllm()
    torch.accelerator.empty_cache = lambda: None  # as in vLLM's CPU worker
    found = []
    for settings in ({}, DFLOAT11):
        config = config_of(model, rank, port, **settings)
        with set_current_vllm_config(config):
            if not found:
                init_distributed_environment(1, 0, "env://", 0, backend="gloo")
                initialize_model_parallel(1, 1)
            found.append(held(experts_of(get_model(vllm_config=config))))
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    os._exit(0)  # the process groups end with both processes
