"""A script: update the weights of an engine of two ranks in processes of their own, twice in vain.

python update_ranks.py FIRST SECOND DAMAGED RESULT.json: three checkpoints, and where to write what happened.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import answers, ask, engine

RANKS = dict(tensor_parallel_size=2)


def reload_with_a_fault(worker: Any, path: str, failing_rank: int) -> None:
    """Reload a checkpoint; on one rank its source raises half-way."""
    from safetensors.torch import load_file

    def pairs() -> Iterator[tuple[str, Any]]:
        for i, pair in enumerate(load_file(f"{path}/model.safetensors").items()):
            if worker.rank == failing_rank and i == 12:
                raise OSError(f"rank {failing_rank} lost the trainer")
            yield pair

    worker.reload_weights(weights_iterator=pairs())


def what_fails(llm: Any, *args: Any, **kwargs: Any) -> str:
    try:
        llm.collective_rpc(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(first: str, second: str, damaged: str, result: str) -> None:
    found: dict[str, Any] = {}
    with engine(Path(first), quantization="dfloat11", **RANKS) as llm:
        found["before"] = ask(llm)
        found["damaged"] = what_fails(llm, "reload_weights", kwargs={"weights_path": damaged})
        found["after damaged"] = ask(llm)
        found["one rank"] = what_fails(llm, reload_with_a_fault, args=(second, 1))
        found["after one rank"] = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": second})
        found["after reload"] = ask(llm)
    found["bf16"] = answers(Path(second), **RANKS)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
