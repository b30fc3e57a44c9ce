"""--offload-group-size, block by block: each finds its own weights in a buffer that blocks share, or an error."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config.offload import OffloadConfig, PrefetchOffloadConfig
from vllm.model_executor.offloader import create_offloader, get_offloader, prefetch, set_offloader
from vllm.v1.worker.cpu_model_runner import _torch_cuda_wrapper

from vllm_dfloat.device import ops
from vllm_dfloat.device.host_arena import KEPT_FREE, HostArena
from vllm_dfloat.errors import DeviceError, FormatError, UnsupportedError
from vllm_dfloat.integration.layers import method
from vllm_dfloat.integration.seam import offloader as seam
from vllm_dfloat.integration.seam.places import is_on_host
from vllm_dfloat.integration.seam.prefetcher import PackedPrefetcher

ROWS, COLS = 64, 512
NORMAL, FLAT = 0.0, 40.0  # how many powers of two the weights spread over: FLAT ones hardly shrink


def weight(seed: int, spread: float = NORMAL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, COLS, generator=generator)
    exponents = torch.rand(ROWS, COLS, generator=generator) * spread
    return (values * 0.02 * 2.0**-exponents).to(torch.bfloat16)


def give(layer: torch.nn.Module, seed: int, spread: float = NORMAL) -> None:
    method.hold(layer, ops.pack(weight(seed, spread), f"w{seed}"))


def read(layer: torch.nn.Module) -> torch.Tensor:
    """Decode as a forward pass does, which knows the descriptor alone."""
    out = torch.empty(ROWS * COLS, dtype=torch.bfloat16)
    ops.launch_decode(
        layer.__dict__[method.DESC],
        ROWS,
        COLS,
        out,
        torch.empty(ROWS * COLS // 2048, dtype=torch.int32),
    )
    return out.view(ROWS, COLS)


class Block(torch.nn.Module):
    """A transformer block: a compressed layer, which has no values while the model is built, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(COLS, ROWS, bias=False, device="meta")
        self.norm = torch.nn.LayerNorm(COLS)
        self.seen = torch.empty(0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.seen = read(self.proj)
        return hidden_states


Make = Callable[..., PackedPrefetcher]


@pytest.fixture
def make() -> Iterator[Make]:
    """Yield a function that puts our offloader in the place of the one that vLLM makes of these options."""
    before = get_offloader()

    def made(room: int = 1 << 40, **options: Any) -> PackedPrefetcher:
        config = OffloadConfig(prefetch=PrefetchOffloadConfig(**options))
        with _torch_cuda_wrapper():  # as vLLM's model runner for CPUs
            set_offloader(create_offloader(config))
        seam.install()
        found = seam.offloader()
        assert isinstance(found, PackedPrefetcher)
        found.arena = HostArena(None, lambda: room)
        return found

    yield made
    set_offloader(before)


def loaded(
    found: PackedPrefetcher, count: int, spreads: dict[int, float] | None = None
) -> list[Any]:
    """Return blocks as they are when a model is loaded: block i has weight(i)."""
    blocks = found.wrap_modules(Block() for _ in range(count))
    found.check_host_memory(1)
    for seed, block in enumerate(blocks):
        give(block.proj, seed, (spreads or {}).get(seed, NORMAL))
        assert torch.equal(read(block.proj), weight(seed, (spreads or {}).get(seed, NORMAL)))
    found.post_init()
    return blocks


def run(blocks: list[Any]) -> list[bool]:
    """Run the blocks in order; return which of them found their own weights, those of their number."""
    x = torch.zeros(1)
    for block in blocks:
        block(x)
    return [torch.equal(block.seen, weight(seed)) for seed, block in enumerate(blocks)]


@pytest.mark.parametrize(
    ("count", "group", "num", "step", "offloaded"),
    [
        (6, 2, 1, 1, 3),
        (5, 1, 1, 1, 5),
        (5, 1, 1, 2, 5),  # not a multiple of the slots
        (6, 3, 2, 2, 4),
        (2, 1, 1, 2, 2),  # a slot for each
        (2, 1, 1, 5, 2),  # more slots than blocks
        (4, 4, 1, 3, 1),
    ],
)
def test_every_block_finds_its_own_weights_in_a_buffer_of_its_slot(
    make: Make, count: int, group: int, num: int, step: int, offloaded: int
) -> None:
    found = make(offload_group_size=group, offload_num_in_group=num, offload_prefetch_step=step)
    blocks = loaded(found, count)
    chosen = [i for i in range(count) if i % group >= group - num]
    assert [is_on_host(block.proj) for block in blocks] == [i in chosen for i in range(count)]
    assert len(chosen) == offloaded
    held = [method.packed_of(blocks[i].proj) for i in chosen]
    assert found.arena.num_bytes >= sum(packed.payload.nbytes for packed in held)
    assert found.buffer_bytes == found.buffer_pool.total_bytes
    assert found.buffer_bytes == step * max(found.largest("proj.weight") for _ in chosen)
    addresses = {packed.staged.data_ptr() for packed in held}
    assert len(addresses) == min(step, offloaded)
    for _ in range(3):
        assert all(run(blocks))
        for packed in held:
            packed.check_descriptor()
            packed.check_payload()


def test_norms_stay_on_the_device_and_names_choose_as_in_vllm(make: Make) -> None:
    found = make(offload_group_size=1, offload_params={"norm"})
    blocks = loaded(found, 2)
    assert found.num_named == found.buffer_bytes == 0
    assert not any(is_on_host(block.proj) for block in blocks)
    assert all(run(blocks))


def test_a_copy_that_is_left_out_is_an_error_and_never_another_layers_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a buffer that holds another layer's payload of the same size and fields is decoded without a word.
    found = make(offload_group_size=1)
    blocks = loaded(found, 3)
    assert all(run(blocks))
    monkeypatch.setattr(found, "_start_prefetch", lambda layer_idx: None)
    monkeypatch.setattr(found, "is_in_its_slot", lambda module: True)
    x = torch.zeros(1)
    blocks[0](x)
    assert torch.equal(blocks[0].seen, weight(0))
    with pytest.raises(FormatError, match="w1: another layer's payload lies where its own"):
        blocks[1](x)


@pytest.mark.parametrize("order", [[0, 1, 0, 1, 2], [2, 0, 1], [1, 1], [0, 1, 2, 3, 0]])
def test_blocks_that_run_out_of_order_find_their_weights(make: Make, order: list[int]) -> None:
    found = make(offload_group_size=1, offload_prefetch_step=2)
    blocks = loaded(found, 4)
    for i in order:  # also a pass that was ended by an error
        blocks[i](torch.zeros(1))
        assert torch.equal(blocks[i].seen, weight(i))
    assert all(run(blocks))


def test_a_layer_is_read_out_of_its_turn_from_host_memory(make: Make) -> None:
    found = make(offload_group_size=1)
    blocks = loaded(found, 3)
    for seed, block in enumerate(blocks):
        packed = method.packed_of(block.proj)
        assert torch.equal(ops.unpack(packed.at_rest()), weight(seed))
        packed.payload[100] ^= 1
        with pytest.raises(FormatError, match=f"w{seed}: .* were changed after encoding"):
            ops.unpack(packed.at_rest())
        packed.payload[100] ^= 1
        assert packed.desc.tolist() == (packed.words if seed == 0 else [0] * 4)
    method.packed_of(blocks[1].proj).desc[1] = 1
    with pytest.raises(FormatError, match="w1: descriptor"):
        method.packed_of(blocks[1].proj).at_rest()


def test_new_weights_are_served_also_by_the_block_whose_turn_is_next(make: Make) -> None:
    # Bug caught: the old payload served once more from a buffer that was filled before the update; memory that a
    # captured graph copies from is another after it.
    found = make(offload_group_size=1, offload_prefetch_step=2)
    blocks = loaded(found, 5)
    places = [method.packed_of(block.proj).payload.data_ptr() for block in blocks]
    descs = [method.packed_of(block.proj).desc.data_ptr() for block in blocks]
    assert all(run(blocks))
    size = found.arena.num_bytes
    for seed, block in enumerate(blocks):
        give(block.proj, seed + 10)
    assert [method.packed_of(block.proj).payload.data_ptr() for block in blocks] == places
    assert [method.packed_of(block.proj).desc.data_ptr() for block in blocks] == descs
    for _ in range(2):
        run(blocks)
        assert all(torch.equal(block.seen, weight(i + 10)) for i, block in enumerate(blocks))
    assert found.arena.num_bytes == size


def test_an_update_that_is_undone_brings_the_old_weights_back(make: Make) -> None:
    found = make(offload_group_size=1)
    blocks = loaded(found, 3)
    saved = [method.packed_of(block.proj).to("cpu") for block in blocks]
    for block in blocks:
        give(block.proj, 20)
    for block, before in zip(blocks, saved, strict=True):
        assert torch.equal(ops.unpack(before), weight(int(before.name[1:])))
        method.hold(block.proj, before)
    assert all(run(blocks))


@pytest.mark.parametrize("number", [0, 2])
def test_a_payload_that_outgrows_its_place_is_served_from_the_device_and_comes_back(
    make: Make, number: int, log_lines: list[str]
) -> None:
    found = make(offload_group_size=1)
    blocks = loaded(found, 3)
    layer = blocks[number].proj
    give(layer, 30, FLAT)
    assert f"w30 grew to {method.packed_of(layer).payload.nbytes} bytes, more than" in log_lines[-1]
    assert not is_on_host(layer)
    for _ in range(2):
        run(blocks)
        assert torch.equal(blocks[number].seen, weight(30, FLAT))
        assert torch.equal(blocks[1].seen, weight(1))
    give(layer, number)
    assert is_on_host(layer)
    assert all(run(blocks))


def test_blocks_of_a_draft_model_stay_on_the_device_and_a_second_stack_is_refused(
    make: Make,
) -> None:
    found = make(offload_group_size=1)
    blocks = loaded(found, 2)
    drafts = found.wrap_modules([Block()])
    seam.install()  # before the draft model is built
    assert get_offloader() is found
    give(drafts[0].proj, 7)
    assert not is_on_host(drafts[0].proj)
    assert all(run(blocks))
    again = make(offload_group_size=1)
    again.wrap_modules([Block()])
    with pytest.raises(
        UnsupportedError, match=r"--offload-group-size 1 .*several stacks.*Use --cpu-offload-gb"
    ):
        again.wrap_modules([Block()])


def test_a_layer_that_two_blocks_share_stays_on_the_device(make: Make) -> None:
    found = make(offload_group_size=1)
    one, two = Block(), Block()
    two.proj = one.proj
    blocks = found.wrap_modules([one, two])
    give(one.proj, 0)
    found.post_init()
    assert not is_on_host(one.proj)
    for block in blocks:
        block(torch.zeros(1))
        assert torch.equal(block.seen, weight(0))


def test_a_ring_in_which_vllm_overwrites_a_slot_in_use_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(prefetch, "_get_next_prefetch_index", raising=False)  # as 0.28
    with pytest.raises(UnsupportedError, match=r"--offload-prefetch-step 2: .* 3, is a multiple"):
        make(offload_group_size=1, offload_prefetch_step=2).wrap_modules(Block() for _ in range(3))
    make(offload_group_size=1, offload_prefetch_step=2).wrap_modules(Block() for _ in range(4))


def test_too_small_a_host_is_refused_before_any_weight_arrives(make: Make) -> None:
    found = make(offload_group_size=2, room=KEPT_FREE + ROWS * COLS)
    found.wrap_modules(Block() for _ in range(2))
    with pytest.raises(DeviceError, match=r"--offload-group-size 2 .*, for 2 ranks: \d+ bytes"):
        found.check_host_memory(2)


def test_a_payload_that_has_outgrown_its_place_is_sound_and_readable_when_it_is_not_its_turn(
    make: Make,
) -> None:
    # Bug caught: told as damaged, and an update of a part of the layer refused, since the rest could not be read.
    blocks = loaded(make(offload_group_size=1), 2)
    layer = blocks[1].proj
    give(layer, 30, FLAT)
    run(blocks)
    assert layer.__dict__[method.DESC].tolist() == [0, 0, 0, 0]  # the other's turn
    grown = method.packed_of(layer)
    grown.check_descriptor()
    assert torch.equal(ops.unpack(grown.at_rest()), weight(30, FLAT))
    saved = grown.to("cpu")
    give(layer, 1)
    assert all(run(blocks))
    method.hold(layer, saved)  # an update that is undone
    run(blocks)
    assert torch.equal(blocks[1].seen, weight(30, FLAT))
    method.packed_of(layer).check_descriptor()
