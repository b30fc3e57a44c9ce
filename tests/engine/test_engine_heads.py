"""Engines whose LM head is larger than the scratch: answers of BF16 vLLM, with slabs and with the whole head."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engine_pairs import ENVIRONMENT
from engines import answers, answers_elsewhere, bf16_answers, normal

from vllm_dfloat.device.scratch import scratch
from vllm_dfloat.integration.layers import head_op
from vllm_dfloat.kernels import configs

pytestmark = pytest.mark.engine

ROWS, COLS = 2048, 256
SIZES = dict(vocab_size=ROWS, intermediate_size=512)  # the head is twice the largest linear layer
MODES = {"eager": True, "traced": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm_dfloat.integration.layers import proof_cache

    monkeypatch.setattr(proof_cache, "folder", lambda: tmp_path)
    scratch.release()
    head_op.known.clear()
    yield
    scratch.release()


def model(folder: Path, name: str) -> Path:
    path = folder / name
    return path if path.exists() else tiny_models.save(name, path, **SIZES)


def dfloat11(**options: Any) -> dict[str, Any]:
    return dict(quantization="dfloat11", additional_config={"dfloat11": options})


def test_answers_are_those_of_bf16_and_the_scratch_is_smaller_than_the_head(
    folder: Path, log_lines: list[str]
) -> None:
    # The prompts' log-probabilities, of more rows than are sampled from, are computed with the whole head.
    with configs.override(
        replace(configs.INTERPRETED, slab_bytes=1)
    ):  # or the test's head is held whole
        found = answers(model(folder, "llama"), **dfloat11())
    assert any("LM head [2048, 256] in 2 slabs of 1024 rows" in line for line in log_lines)
    assert scratch.num_bytes(torch.device("cpu")) < 2 * ROWS * COLS * 2 // 3
    (known,) = head_op.known.values()
    assert known.equal
    assert not known.is_to_be_counted  # its memory was taken once
    assert found == bf16_answers(model(folder, "llama"))


@pytest.mark.on_demand
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "phi", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slab": "off"},
        {"slab": 1 << 18},
        {"slab": 1 << 18, "layout": "dfloat11"},
        {"slab": 1 << 18, "layout": "fast"},
        {"slab": 1 << 18, "layout": "auto"},
    ],
    ids=str,
)
def test_answers_are_those_of_bf16_with_every_slab(
    options: dict[str, Any], name: str, mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo traces, without Inductor's C++ compiles
    path, how = model(folder, name), dict(enforce_eager=MODES[mode])
    assert answers(path, **how, **dfloat11(**options)) == bf16_answers(path, **how)
    if "slab" in options and options["slab"] != "off":
        assert scratch.num_bytes(torch.device("cpu")) < 2 * ROWS * COLS * 2 // 3


@pytest.mark.on_demand
@pytest.mark.parametrize(
    "ranks", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str
)
def test_ranks_answer_as_those_of_bf16(ranks: dict[str, int], folder: Path, tmp_path: Path) -> None:
    common = dict(model=str(model(folder, "llama")), **ranks)
    runs = [common, {**common, **dfloat11(slab=1 << 17)}, {**common, **dfloat11()}]
    environment = {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    expected, *found = answers_elsewhere(runs, tmp_path, environment, timeout=900)
    assert found == [normal(expected)] * 2
    assert list((tmp_path / "cache/dfloat11/proofs").glob("*.json"))
