"""The check of a live engine names every tensor that was changed from outside, and no other."""

import re

import pytest
import tiny_models
from conftest import Checkpoint
from engines import engine

from vllm_dfloat.errors import FormatError
from vllm_dfloat.integration.layers.method import packed_of
from vllm_dfloat.integration.loading.live_check import METHOD_NAME

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "layout", ["packed", "dfloat11", pytest.param("fast", marks=pytest.mark.on_demand)]
)
def test_check_names_a_flipped_bit_of_any_part_and_is_clean_before_and_after(
    layout: str, bf16_checkpoint: Checkpoint
) -> None:
    settings = dict(quantization="dfloat11", additional_config={"dfloat11": {"layout": layout}})
    with engine(bf16_checkpoint("qwen3"), **settings) as llm:
        model = llm.llm_engine.model_executor.driver_worker.get_model()
        weights = {w.name: w for layer in model.modules() if (w := packed_of(layer)) is not None}
        (clean,) = llm.collective_rpc(METHOD_NAME)
        assert clean["damaged"] == []
        assert clean["tensors"] == len(weights)  # the tied one once
        assert clean["bytes"] == sum(weight.num_bytes for weight in weights.values())
        assert clean["rank"] == 0
        norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
        assert clean["not_compared"] == norms
        down, embedding = weights["model.layers.1.mlp.down_proj"], weights["model.embed_tokens"]
        down.payload[down.payload.numel() // 2] ^= 1
        embedding.desc[1] ^= 1
        (report,) = llm.collective_rpc(METHOD_NAME)
        named = sorted(sentence.partition(":")[0] for sentence in report["damaged"])
        assert named == [embedding.name, down.name]
        # Bug caught: of a data-parallel server vLLM returns the first engine's reports only, which were clean.
        parallel = llm.llm_engine.model_executor.driver_worker.worker.vllm_config.parallel_config
        parallel.data_parallel_index = 1
        with pytest.raises(FormatError, match=rf"engine 1 .*{re.escape(down.name)}"):
            llm.collective_rpc(METHOD_NAME)
        parallel.data_parallel_index = 0
        down.payload[down.payload.numel() // 2] ^= 1
        embedding.desc[1] ^= 1
        assert llm.collective_rpc(METHOD_NAME) == [clean]


def test_check_is_clean_after_new_weights_were_loaded(
    bf16_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tiny_models.save("llama", tmp_path_factory.mktemp("other"), seed=7)
    with engine(bf16_checkpoint("llama"), quantization="dfloat11") as llm:
        (before,) = llm.collective_rpc(METHOD_NAME)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        (after,) = llm.collective_rpc(METHOD_NAME)
        assert before["damaged"] == after["damaged"] == []
        assert before["tensors"] == after["tensors"] > 0
