"""--cpu-offload-gb, layer by layer: which payloads go to host memory, when new weights change their sizes too."""

import pytest
import torch
from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig, UVAOffloadConfig
from vllm.model_executor.offloader import create_offloader, get_offloader, set_offloader
from vllm.model_executor.offloader.uva import UVAOffloader
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import _torch_cuda_wrapper

from vllm_dfloat.device import ops
from vllm_dfloat.device.host_arena import KEPT_FREE, HostArena
from vllm_dfloat.errors import DeviceError, UnsupportedError
from vllm_dfloat.integration.layers import method
from vllm_dfloat.integration.loading.offload import listed
from vllm_dfloat.integration.seam import offloader as seam
from vllm_dfloat.integration.seam.places import is_on_host
from vllm_dfloat.integration.seam.prefetcher import PackedPrefetcher
from vllm_dfloat.integration.seam.uva_offloader import PackedOffloader

ROWS, COLS = 64, 512
NORMAL, FLAT = 0.0, 40.0  # how many powers of two the weights spread over: FLAT ones hardly shrink


def weight(spread: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, COLS, generator=generator)
    exponents = torch.rand(ROWS, COLS, generator=generator) * spread
    return (values * 0.02 * 2.0**-exponents).to(torch.bfloat16)


def size_of(spread: float) -> int:
    return ops.pack(weight(spread)).payload.nbytes


class Block(torch.nn.Module):
    """A transformer block under construction: compressed layers have no values yet."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.ModuleDict(
            {
                name: torch.nn.Linear(COLS, ROWS, bias=False, device="meta")
                for name in ("up", "down")
            }
        )
        self.norm = torch.nn.LayerNorm(COLS)


def offloader(max_bytes: int, *params: str, room: int = 1 << 40) -> PackedOffloader:
    made = PackedOffloader(UVAOffloader(max_bytes, set(params)), None)
    made.arena = HostArena(None, lambda: room)
    return made


def layers_of(blocks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    return [layer for block in blocks for layer in block.mlp.values()]


def on_host(layers: list[torch.nn.Module]) -> list[bool]:
    return [is_on_host(layer) for layer in layers]


def give(layer: torch.nn.Module, spread: float = NORMAL, seed: int = 0) -> ops.PackedWeight:
    method.hold(layer, ops.pack(weight(spread, seed), "w"))
    held = method.packed_of(layer)
    assert held is not None
    assert torch.equal(ops.unpack(held).view(torch.int16), weight(spread, seed).view(torch.int16))
    return held


def test_payloads_go_to_the_host_until_the_first_that_does_not_fit() -> None:
    size = size_of(NORMAL)
    found = offloader(int(3.1 * size))
    layers = layers_of(found.wrap_modules(Block() for _ in range(3)))
    for layer in layers:
        give(layer)
    assert on_host(layers) == [True, True, True, False, False, False]
    assert found.cpu_offload_bytes == found.arena.num_bytes == 3 * size


def test_a_payload_that_would_exceed_the_budget_ends_offload_although_a_smaller_one_follows() -> (
    None
):
    found = offloader(int(1.05 * size_of(NORMAL)))
    layers = layers_of(found.wrap_modules([Block()]))
    give(layers[0], FLAT)
    give(layers[1])
    assert on_host(layers) == [False, False]
    assert found.cpu_offload_bytes == 0


@pytest.mark.parametrize(
    ("params", "prefix", "expected"),
    [
        ([], "", [True, True]),
        (["down"], "", [False, True]),
        (["mlp.down.weight"], "", [False, True]),
        (["own", "weigh", "up.w"], "", [False, False]),
        (["visual"], "visual", [True, True]),
        (["visual.mlp.up"], "visual", [True, False]),
    ],
)
def test_parameters_are_named_by_whole_segments_as_in_vllm(
    params: list[str], prefix: str, expected: list[bool]
) -> None:
    found = offloader(1 << 30, *params)
    layers = layers_of(found.wrap_modules([Block()], prefix=prefix))
    for layer in layers:
        give(layer)
    assert on_host(layers) == expected


def test_layers_outside_of_the_blocks_stay_on_the_device() -> None:
    found = offloader(1 << 30)
    found.wrap_modules([Block()])
    head = torch.nn.Linear(COLS, ROWS, bias=False, device="meta")
    give(head)
    assert not is_on_host(head)
    assert found.cpu_offload_bytes == 0


def test_an_update_leaves_payloads_where_they_are_and_frees_the_old_ones() -> None:
    size = size_of(NORMAL)
    found = offloader(int(1.05 * size))
    layers = layers_of(found.wrap_modules([Block()]))
    descs = [give(layer).desc.data_ptr() for layer in layers]
    for seed in range(1, 4):
        for layer, desc in zip(layers, descs, strict=True):
            assert give(layer, seed=seed).desc.data_ptr() == desc
        assert on_host(layers) == [True, False]
        held = method.packed_of(layers[0]).payload.nbytes
        assert found.cpu_offload_bytes == found.arena.num_bytes == held


def test_a_weight_that_outgrows_the_budget_goes_to_the_device_and_may_come_back(
    log_lines: list[str],
) -> None:
    # Bug caught: a budget exceeded by an update, or counted twice for a layer that was updated twice.
    found = offloader(int(2.05 * size_of(NORMAL)))
    layers = layers_of(found.wrap_modules([Block()]))
    for layer in layers:
        give(layer)
    give(layers[1], FLAT)
    assert on_host(layers) == [True, False]
    assert found.cpu_offload_bytes == found.arena.num_bytes == size_of(NORMAL)
    assert "w grew to" in log_lines[-1]
    give(layers[0], FLAT)  # alone it fits
    assert on_host(layers) == [True, False]
    assert found.cpu_offload_bytes == size_of(FLAT) <= found.cpu_offload_max_bytes
    for layer in layers:
        give(layer)
    assert on_host(layers) == [True, True]
    assert found.cpu_offload_bytes == found.arena.num_bytes == 2 * size_of(NORMAL)


def test_an_update_that_is_undone_brings_the_old_payload_back_without_a_copy() -> None:
    found = offloader(int(1.05 * size_of(NORMAL)))
    (layer, _) = layers_of(found.wrap_modules([Block()]))
    old = give(layer)
    give(layer, FLAT)
    assert not is_on_host(layer)
    method.hold(layer, old.to("cpu"))
    assert method.packed_of(layer).payload is old.payload
    assert is_on_host(layer)
    assert found.cpu_offload_bytes == found.arena.num_bytes == size_of(NORMAL)
    assert torch.equal(ops.unpack(method.packed_of(layer)), weight(NORMAL))


def test_a_host_without_room_is_named_and_the_old_weight_stays() -> None:
    size = size_of(NORMAL)
    found = offloader(1 << 30)
    (layer, _) = layers_of(found.wrap_modules([Block()]))
    old = give(layer)
    found.arena._available = lambda: KEPT_FREE + size - 1
    with pytest.raises(DeviceError, match=f"w: {size} bytes for the host's memory"):
        give(layer)
    assert method.packed_of(layer) is old
    assert found.cpu_offload_bytes == found.arena.num_bytes == size


def test_too_small_a_host_is_refused_before_any_weight_arrives() -> None:
    bf16 = 2 * ROWS * COLS * 2
    room = KEPT_FREE + int(0.6 * bf16)
    found = offloader(1 << 30, room=room)
    found.wrap_modules([Block()])
    with pytest.raises(DeviceError, match=r"--cpu-offload-gb 1, for 2 ranks: \d+ bytes"):
        found.check_host_memory(2)
    again = offloader(1 << 30, room=room)
    again.wrap_modules([Block()])
    again.check_host_memory(1)
    small = offloader(1000, room=KEPT_FREE + 999)
    small.wrap_modules([Block()])
    with pytest.raises(DeviceError, match="1000 bytes"):
        small.check_host_memory(1)


def test_layers_are_listed_in_few_words() -> None:
    names = [f"model.layers.{i}.{leaf}" for i in (0, 1, 2, 10) for leaf in ("qkv", "mlp.down")]
    assert listed(["head", *names, "model.layers.11.qkv"]) == (
        "head, model.layers.0-2 (qkv, mlp.down), model.layers.10 (qkv, mlp.down), model.layers.11 (qkv)"
    )
    assert listed([]) == ""


SWITCHES = ("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", "VLLM_WEIGHT_OFFLOADING_DISABLE_PIN_MEMORY")
PREFETCH = OffloadConfig(prefetch=PrefetchOffloadConfig(offload_group_size=2))


@pytest.mark.parametrize("switch", [None, *SWITCHES])
@pytest.mark.parametrize(
    ("config", "ours"),
    [
        (OffloadConfig(uva=UVAOffloadConfig(cpu_offload_gb=1)), PackedOffloader),
        (PREFETCH, PackedPrefetcher),
    ],
)
def test_switched_off_uva_or_pinned_memory_is_refused_on_a_gpu(
    config: OffloadConfig, ours: type, switch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr("vllm.model_executor.offloader.uva.is_uva_available", lambda: True)
    monkeypatch.setattr(seam, "is_uva_available", lambda: True)
    monkeypatch.setattr("vllm.model_executor.offloader.base.is_pin_memory_available", lambda: True)
    if switch:
        monkeypatch.setenv(switch, "1")
    before = get_offloader()
    with _torch_cuda_wrapper():
        set_offloader(vllms := create_offloader(config))
    try:
        if switch is None:
            seam.install()
            assert type(get_offloader()) is ours
            return
        with pytest.raises(UnsupportedError, match=f"switched off .* Unset .*{switch}"):
            seam.install()
        assert get_offloader() is vllms  # nothing has begun
    finally:
        set_offloader(before)
