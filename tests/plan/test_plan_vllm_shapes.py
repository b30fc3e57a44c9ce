"""A plan's numbers for each rank of a published model, against vLLM's own model, built without weights."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import cached_models
import pytest
import vllm_shapes
from engines import run_bounded

from vllm_dfloat.plan.architectures import known_weights
from vllm_dfloat.plan.config import read_model_config
from vllm_dfloat.plan.kv_cache import latent_page_bytes, page_bytes
from vllm_dfloat.plan.memory import kv_cache_of, split_layers
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.rotary import rotary_bytes
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.states import State

pytestmark = pytest.mark.engine

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
ROOM = 1 << 40  # of KV cache: one request of ten million tokens takes 481 GiB
ALWAYS = (
    "gemma-3-4b-it", "Qwen2.5-VL-72B-Instruct", "Qwen3-VL-8B-Instruct", "Llama-4-Scout-17B-16E-Instruct",
    "DeepSeek-V3", "Mistral-Nemo-Instruct-2407",
)  # fmt: skip
NAMES = sorted(file.stem for file in CONFIGS.glob("*.json"))
BY_NAME = [
    name if name in ALWAYS else pytest.param(name, marks=pytest.mark.on_demand) for name in NAMES
]
RANKS = {"whole": (1, 1, 0), "first of TP 2 x PP 2": (2, 2, 0), "last of TP 2 x PP 2": (2, 2, 1)}
CACHE_RANKS = {"whole": (1, 1, 0), "TP 2": (2, 1, 0)}
ON_A_CPU = "float32"  # what vLLM makes of --mamba-ssm-cache-dtype auto there


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:  # fmt: skip
    """Return folders with the configs, as if all weights were in BF16."""
    root, found = tmp_path_factory.mktemp("configs"), {}
    for name in NAMES if request.config.getoption("--full") else ALWAYS:
        entries = json.loads((CONFIGS / f"{name}.json").read_text())
        entries.pop("quantization_config", None)
        if name.startswith(
            "Mistral-Small"
        ):  # as in vLLM after it has found the LM head in the files
            entries["tie_word_embeddings"] = entries["text_config"]["tie_word_embeddings"] = False
        found[name] = root / name
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(entries))
    return found | {name: cached_models.save(name, root / name) for name in cached_models.MODELS}


@pytest.fixture(scope="module")
def of_vllm(folders: dict[str, Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the contents of vLLM's models, by name and rank; one process builds all, and imports vLLM once."""
    keys = [
        (name, ranks)
        for name in folders
        for ranks in (CACHE_RANKS if name in cached_models.MODELS else RANKS)
    ]
    runs = []
    for name, ranks in keys:
        tp, pp, stage = {**RANKS, **CACHE_RANKS}[ranks]
        runs.append(dict(model=str(folders[name]), tp=tp, pp=pp, stage=stage, room=ROOM if pp == 1 else 0))  # fmt: skip
    folder = next(iter(folders.values())).parent
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, vllm_shapes.__file__]
    command += [str(folder / "runs.json"), str(folder / "answers.json")]
    run_bounded(command, folder / "log.txt", {}, timeout=600)
    return dict(zip(keys, json.loads((folder / "answers.json").read_text()), strict=True))


def vllm_name(parameter: str) -> str:
    """Return the plan's name of a parameter of vLLM."""
    return parameter.replace(".routed_experts.", ".").removesuffix(".weight")


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_rank_holds_the_weights_tables_and_caches_that_the_plan_says(
    name: str,
    ranks: str,
    folders: dict[str, Path],
    of_vllm: dict[tuple[str, str], dict[str, Any]],
) -> None:
    tp, pp, stage = RANKS[ranks]
    config = read_model_config(folders[name] / "config.json")
    layers = split_layers(config.num_layers, pp)[stage]
    planned = {}
    for weight in known_weights(config):
        if weight.is_on_stage(stage, layers, pp):
            numel = math.prod(weight.shape_of_rank(tp))
            planned[weight.name] = [numel, weight.itemsize, weight.is_compressed]
    found = of_vllm[name, ranks]
    weights = found["weights"].items()
    assert planned == {vllm_name(k): [math.prod(shape), *rest] for k, (shape, *rest) in weights}
    # In addition to the language model's, towers have small tables that the plan leaves out.
    assert 0 <= found["tables"] - rotary_bytes(config, layers) < 1 << 20
    assert found["context"] == config.context
    for layer, cache in found["caches"].items():
        reach = config.reaches[int(re.findall(r"layers\.(\d+)", layer)[0])]
        per_token = (
            latent_page_bytes(config.latent, 1, "auto")
            if config.latent
            else page_bytes(config.kv_heads, 2 * config.head_dim, tp, 1, "auto")
        )
        assert cache == [per_token, reach.tokens, reach.is_chunk], layer


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fixed_cache_holds_the_tokens_that_the_plan_says(
    name: str, folders: dict[str, Path], of_vllm: dict[tuple[str, str], dict[str, Any]]
) -> None:
    settings = Settings(
        gpu_memory=1 << 45,
        gpu_memory_utilization=1,
        block_size=128,  # vLLM's on a CPU
        max_num_batched_tokens=vllm_shapes.BATCHED_TOKENS,
        in_flight_batches=1,
        overhead=0,
        kv_cache_memory=ROOM,
    )
    plan = make_plan(str(folders[name]), settings)
    assert plan.bf16.tokens == plan.dfloat11.tokens == of_vllm[name, "whole"]["tokens"]


@pytest.mark.parametrize("ranks", CACHE_RANKS)
@pytest.mark.parametrize("name", cached_models.MODELS)
def test_caches_have_the_sizes_groups_and_tokens_of_vllms(
    name: str,
    ranks: str,
    folders: dict[str, Path],
    of_vllm: dict[tuple[str, str], dict[str, Any]],
) -> None:
    found, config = of_vllm[name, ranks], read_model_config(folders[name] / "config.json")
    tp, _, _ = CACHE_RANKS[ranks]
    settings = Settings(
        tp=tp, block_size=128, max_num_batched_tokens=vllm_shapes.BATCHED_TOKENS, in_flight_batches=1,
        mamba_ssm_cache_dtype=ON_A_CPU,
    )  # fmt: skip
    cache = kv_cache_of(config, settings)
    pages = [page for group in cache.groups for page in group.pages]
    bytes_of_tokens = sorted(
        page.page_bytes // page.block_size for page in pages if not page.states
    )
    states = [cached.kind for cached in config.caches if isinstance(cached.kind, State)]
    assert bytes_of_tokens == sorted(
        size for layer, (size, *_) in found["caches"].items() if layer not in found["states"]
    )
    assert sorted(state.num_bytes(tp, ON_A_CPU) for state in states) == sorted(
        found["states"].values()
    )
    num_blocks = ROOM // cache.block_bytes(range(config.num_layers))
    assert cache.capacity(num_blocks, config.context) == found["tokens"]
    assert config.context == found["context"]
    if states:
        assert pages[0].block_size == found["block_size"]
