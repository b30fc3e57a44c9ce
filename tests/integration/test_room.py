"""Payloads of updates lie where vLLM's sleep mode frees them: in the room of the payload before, or in its pool."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from model_loads import loaded
from safetensors.torch import load_file

from vllm_dfloat.integration.layers import room
from vllm_dfloat.integration.layers.method import packed_of

pytestmark = pytest.mark.engine

O_PROJ = "model.layers.0.self_attn.o_proj"


class Pool:
    """Stands for vLLM's allocator of sleep mode, which needs a GPU."""

    def __init__(self) -> None:
        self.allocator_and_pools: dict[str, Any] = {"weights": [("pool", "allocator")]}
        self.used: list[str] = []

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        self.used.append(tag)
        yield


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(room, "is_kept", lambda device: True)  # as on a GPU
    made = Pool()
    module = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=made))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("room"))


def places(model: torch.nn.Module) -> dict[str, int]:
    found = {name: packed_of(layer) for name, layer in model.named_modules()}
    return {name: one.payload.data_ptr() for name, one in found.items() if one is not None}


def values(model: torch.nn.Module, name: str) -> torch.Tensor:
    layer: Any = model.get_submodule(name)
    found: torch.Tensor = layer.quant_method.dequantize_weight(layer)
    return found


def assert_sound(model: torch.nn.Module) -> None:
    for weight in filter(None, map(packed_of, model.modules())):
        weight.check_descriptor()
        weight.check_payload()


def test_payloads_that_fit_go_into_the_room_of_those_before(checkpoint: Path, pool: Pool) -> None:
    # Bug caught: after an update no payload lay in the pool that sleep mode frees.
    stored = load_file(checkpoint / "model.safetensors")
    with loaded(checkpoint, quantization="dfloat11") as model:
        before = places(model)
        rooms = [one for one in map(packed_of, model.modules()) if one is not None]
        assert all(
            one.room.numel() > one.payload.numel() for one in rooms
        )  # spare, with sleep mode
        assert all(one.num_bytes > one.room.numel() for one in rooms)
        new = {name: tensor.flip(0).contiguous() for name, tensor in stored.items()}
        model.load_weights(new.items())
        assert places(model) == before
        assert torch.equal(values(model, O_PROJ), new[f"{O_PROJ}.weight"])
        assert_sound(model)
    assert pool.used == []


@pytest.mark.parametrize("keeps_pools", [True, False], ids=["0.32", "0.28"])
def test_a_payload_that_has_outgrown_its_room_gets_one_in_the_pool_and_keeps_that(
    keeps_pools: bool, checkpoint: Path, pool: Pool
) -> None:
    if not keeps_pools:
        pool.allocator_and_pools["weights"] = ("pool", "allocator")
    stored = load_file(checkpoint / "model.safetensors")[f"{O_PROJ}.weight"]
    scales = 2.0 ** torch.randint(-60, 60, stored.shape)
    larger = (stored * scales).bfloat16()
    with loaded(checkpoint, quantization="dfloat11") as model:
        first = places(model)
        model.load_weights([(f"{O_PROJ}.weight", larger)])
        second = places(model)
        assert {name for name in first if first[name] != second[name]} == {O_PROJ}
        assert torch.equal(values(model, O_PROJ), larger)
        for weight in (stored, larger.flip(0).contiguous()):
            model.load_weights([(f"{O_PROJ}.weight", weight)])
            assert places(model) == second
            assert torch.equal(values(model, O_PROJ), weight)
        assert_sound(model)
    assert pool.used == ["weights"]


def test_an_update_on_a_cpu_leaves_the_old_payload_whole_to_undo_it(checkpoint: Path) -> None:
    assert not room.is_kept(torch.device("cpu"))
    assert room.is_kept(torch.device("cuda"))
