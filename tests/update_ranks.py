"""A script: update the weights of an engine whose ranks are separate processes, with failing and successful updates.

python update_ranks.py FIRST SECOND DAMAGED NUM_RANKS RESULT.json: three checkpoints, and the file for the result.
"""

import json
import sys
from pathlib import Path
from typing import Any

import update_trainer
from engines import PROMPTS, ask, engine
from vllm.config import WeightTransferConfig

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def ask_each(llm: Any) -> Any:
    """Ask one prompt after the other: an engine in another process batches by arrival time, and batches change bits."""
    return [ask(llm, [prompt], num_tokens=4) for prompt in PROMPTS]


def transfer(llm: Any, **info: Any) -> None:
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", kwargs={"update_info": info})
    llm.collective_rpc("finish_weight_update")


def reload_path(llm: Any, path: str) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})


def main(first: str, second: str, damaged: str, num_ranks: int, result: str) -> None:
    in_vain = {
        "damaged path": lambda llm: reload_path(llm, damaged),
        "reload, first rank": lambda llm: llm.collective_rpc("reload_from", args=(second, 0)),
        "reload, last rank": lambda llm: llm.collective_rpc(
            "reload_from", args=(second, num_ranks - 1)
        ),
        "read, last rank": lambda llm: llm.collective_rpc(
            "read_and_reload", args=(second, num_ranks - 1)
        ),
        "transfer, shape": lambda llm: transfer(llm, path=second, reshaped={O_PROJ: 3}),
        "transfer, last rank": lambda llm: transfer(llm, path=second, failing_rank=num_ranks - 1),
    }
    for_good = {
        "path": lambda llm: reload_path(llm, second),
        "transfer": lambda llm: transfer(llm, path=second),
        "method": lambda llm: llm.collective_rpc("reload_from", args=(second,)),
    }
    found: dict[str, Any] = {"refused": {}, "replies": {}, "after": {}}
    settings: dict[str, Any] = dict(
        quantization="dfloat11",
        worker_extension_cls=f"{update_trainer.__name__}.Trainer",
        weight_transfer_config=WeightTransferConfig(backend="files"),
    )
    with engine(Path(first), tensor_parallel_size=num_ranks, **settings) as llm:
        before = ask_each(llm)
        for name, change in in_vain.items():
            try:
                change(llm)
            except Exception as error:
                found["refused"][name] = str(error)
            found["replies"][name] = llm.collective_rpc("check_dfloat11_weights")
            found["after"][name] = "as before" if ask_each(llm) == before else "changed"
        for name, change in for_good.items():
            change(llm)
            found[name] = ask_each(llm)
            reload_path(llm, first)
            found["after"][name] = "as before" if ask_each(llm) == before else "changed"
    with engine(Path(second), tensor_parallel_size=num_ranks) as llm:
        found["bf16"] = ask_each(llm)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    *paths, ranks, result_path = sys.argv[1:]
    main(*paths, int(ranks), result_path)
