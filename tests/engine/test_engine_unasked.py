"""Embeddings and LM heads that vLLM builds without a quantization config are compressed too, with equal answers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import unasked_models
from engines import answers_elsewhere, ask, bf16_answers, engine

from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.integration.layers.method import packed_of

pytestmark = pytest.mark.engine

CORE = {"opt", "falcon untied", "internlm2"}  # and those of the other tests
OURS = dict(quantization="dfloat11")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("unasked")

    def make(name: str) -> Path:
        path = root / name.replace(" ", "_")
        return path if path.exists() else unasked_models.save(name, path)

    return make


def held(llm: Any) -> set[str]:
    """Return the names of the compressed layers; of tied ones only that of the embedding."""
    model = llm.llm_engine.model_executor.driver_worker.get_model()
    return {name for name, layer in model.named_modules() if packed_of(layer) is not None}


EMBEDDING = "model.embed_tokens.weight"


def set_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING].flip(0).contiguous()


def load_embedding(model: torch.nn.Module) -> None:
    layer: Any = model.get_submodule(EMBEDDING.removesuffix(".weight"))
    weight = layer.quant_method.dequantize_weight(layer)[:250]
    model.load_weights([(EMBEDDING, weight.flip(0).contiguous())])


def summary(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("dfloat11: compressed")]
    return line


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CORE else pytest.mark.on_demand)
        for name in unasked_models.MODELS
    ],
)
def test_model_whose_embedding_vllm_does_not_ask_about_answers_as_bf16(
    name: str, folder: Any, log_lines: list[str]
) -> None:
    # Bug caught: embedding and LM head left in BF16, and not named.
    model, expected = folder(name), unasked_models.MODELS[name][2]
    with engine(model, **OURS) as llm:
        assert set(expected) <= held(llm)
        found = ask(llm)
    assert found == bf16_answers(model)
    assert not any(
        f"{layer} " in summary(log_lines).split("not compressed: ")[1] for layer in expected
    )


def test_tied_embedding_of_a_compressed_folder_is_compressed_and_takes_updates(
    folder: Any, tmp_path: Path, log_lines: list[str]
) -> None:
    model, other = folder("gemma2"), unasked_models.save("gemma2", tmp_path / "other", seed=3)
    compress(open_source(model), tmp_path / "df11", workers=1)
    with engine(tmp_path / "df11") as llm:
        assert "model.embed_tokens" in held(llm)
        before = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        after = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        assert ask(llm) == before
        llm.apply_model(load_embedding)
        updated = ask(llm)
    tiny_models.edit(shutil.copytree(model, tmp_path / "updated"), set_embedding)
    assert updated == bf16_answers(tmp_path / "updated") != before
    assert before == bf16_answers(model)
    assert after == bf16_answers(other) != before
    line = summary(log_lines)
    assert "compressed 9 of 9 layers, 99.68 % of all weight bytes, " in line
    assert line.endswith("; not compressed: vectors (norms and biases) 2304 bytes")


def test_start_up_line_names_what_stays_bf16_with_its_bytes(
    folder: Any, log_lines: list[str]
) -> None:
    names = ["model.embed_tokens", "re:.*experts"]
    ignore = dict(additional_config={"dfloat11": {"ignore": names}})
    with engine(folder("mixtral"), **OURS, **ignore) as llm:
        assert "model.embed_tokens" not in held(llm)
        assert "lm_head" in held(llm)
        found = ask(llm)
    assert found == bf16_answers(folder("mixtral"))
    left = summary(log_lines).split("; not compressed: ")[1].split(", ")
    experts = "model.layers.*.block_sparse_moe.experts"
    assert f"model.embed_tokens {2 * 256 * 128} bytes" in left
    assert any(
        entry.startswith(experts) and entry.endswith(f"w2_weight {2 * 2 * 4 * 128 * 256} bytes")
        for entry in left
    )
    assert f"model.layers.*.block_sparse_moe.gate {2 * 2 * 4 * 128} bytes" in left


def test_dummy_weights_of_such_a_model_are_compressed(folder: Any) -> None:
    dummy = dict(load_format="dummy")
    with engine(folder("gemma2"), **OURS, **dummy) as llm:
        assert "model.embed_tokens" in held(llm)
        found = ask(llm)
    assert found == bf16_answers(folder("gemma2"), **dummy)


@pytest.mark.on_demand
@pytest.mark.alone
@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_two_ranks_answer_as_two_of_bf16(name: str, folder: Any, tmp_path: Path) -> None:
    from engine_pairs import ENVIRONMENT

    run = dict(model=str(folder(name)), tensor_parallel_size=2)
    ours, bf16 = answers_elsewhere([run | OURS, run], tmp_path, ENVIRONMENT, 300)
    assert ours == bf16
    log = (tmp_path / "log.txt").read_text()
    assert (
        log.count("compressed 9 of 9 layers" if name == "gemma2" else "compressed 8 of 10 layers")
        == 2
    )
