"""Experts in a running engine stay BF16: an update gives a whole layer, or is refused and changes nothing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import Checkpoint
from engines import Answers, ask, bf16_answers, engine
from safetensors.torch import load_file

from vllm_dfloat.errors import UnsupportedError

pytestmark = pytest.mark.engine

EXPERTS = "model.layers.1.mlp.experts"
Pairs = list[tuple[str, torch.Tensor]]


class Served:
    """A running engine with experts, and the checkpoint for its update."""

    def __init__(self, llm: object, second: Path) -> None:
        self.llm, self.second = llm, second
        self.model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        self.new = load_file(second / "model.safetensors")
        self.answers = self.ask()

    def ask(self) -> Answers:
        return ask(self.llm)

    def without(self, name: str) -> Pairs:
        return [pair for pair in self.new.items() if name not in pair[0]]

    def only(self, name: str) -> Pairs:
        return [pair for pair in self.new.items() if name in pair[0]]

    def reload(self, **arguments: object) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=arguments)

    def reload_without(self, name: str, path: Path) -> None:
        shutil.copytree(self.second, path)
        tiny_models.edit(path, lambda tensors: [tensors.pop(n) for n in list(tensors) if name in n])
        self.reload(weights_path=str(path))

    def reload_with_half(self, name: str, path: Path) -> None:
        shutil.copytree(self.second, path)
        tiny_models.edit(path, lambda t: t.update({name: t[name].chunk(2, 1)[0].contiguous()}))
        self.reload(weights_path=str(path))


@pytest.fixture(scope="module")
def models(bf16_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    second = tmp_path_factory.mktemp("second") / "model"
    return [bf16_checkpoint("qwen3_moe"), tiny_models.save("qwen3_moe", second, seed=7)]


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> Answers:
    """Return the answers of BF16 vLLM with the other weights; its end would destroy the process groups of a running
    engine, so it runs first."""
    return bf16_answers(models[1])


@pytest.fixture(scope="module")
def running(models: list[Path], expected: Answers) -> Iterator[Served]:
    with engine(models[0], quantization="dfloat11") as llm:
        yield Served(llm, models[1])


# name: (the update, words of the error)
REFUSED: dict[str, tuple[Callable[[Served, Path], None], str]] = {
    "reload without one expert": (
        lambda s, _: s.reload(weights_iterator=iter(s.without(f"{EXPERTS}.2."))),
        r"w13_weight: [0-9]+ of [0-9]+ weights arrived \(missing: expert 2 gate_proj, expert 2 up_proj\); .*"
        r"w2_weight: .*expert 2 down_proj.* All weights are as before",
    ),
    "reload of one matrix of one expert": (
        lambda s, _: s.reload(weights_iterator=iter(s.only(f"{EXPERTS}.0.gate_proj"))),
        r"missing: expert 0 up_proj, expert 1 gate_proj.* All weights are as before",
    ),
    "reload of a path without one matrix": (
        lambda s, path: s.reload_without(f"{EXPERTS}.3.up_proj", path / "model"),
        r"incomplete: .*w13_weight: .*\(missing: expert 3 up_proj\)\. .* All weights are as before",
    ),
    "reload of experts, then a layer in part": (
        lambda s, _: s.reload(weights_iterator=iter([*s.only(f"{EXPERTS}."), *s.only("layers.1.self_attn.q_proj")])),
        r"qkv_proj: [0-9]+ of [0-9]+ weights arrived.* All weights are as before",
    ),
    "load_weights of an expert that is cut off": (
        lambda s, _: s.model.load_weights(
            (n, t if n != f"{EXPERTS}.1.up_proj.weight" else t[:64]) for n, t in s.only(f"{EXPERTS}.")
        ),
        r"1.up_proj.weight \[64, 256\]: 16384 weights; expected 32768, .* All weights are as before",
    ),
    "reload of a path with an expert that is cut off": (
        lambda s, path: s.reload_with_half(f"{EXPERTS}.3.down_proj.weight", path / "model"),
        r"3.down_proj.weight \[256, 64\]: 16384 weights; expected 32768, .* All weights are as before",
    ),
    "load_weights of one expert, of which this CPU's kernel has other bytes": (
        lambda s, _: s.model.load_weights(s.only(f"{EXPERTS}.0.")),
        rf"^{EXPERTS}.*\.w13_weight: only a part of it was given, .* form of a kernel; .* All weights are as before",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_experts_given_in_part_are_refused_and_the_engine_goes_on(
    name: str, running: Served, tmp_path: Path
) -> None:
    # Bug caught: the experts that were not given were served from uninitialised memory.
    update, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words):
        update(running, tmp_path)
    assert running.ask() == running.answers


def test_experts_given_whole_take_effect(running: Served, expected: Answers) -> None:
    # Bug caught: vLLM's CPU kernel packs experts when it is created, and took those of an update for packed ones.
    running.reload(weights_path=str(running.second))
    assert running.ask() == expected
