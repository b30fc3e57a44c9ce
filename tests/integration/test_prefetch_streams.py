"""vLLM's own copies, streams, events and graph rules with compressed payloads, under every order that waits allow."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_streams import Cuda
from vllm.model_executor.offloader import get_offloader, set_offloader
from vllm.model_executor.offloader.prefetch import PrefetchOffloader

from vllm_dfloat.device import host_arena, ops
from vllm_dfloat.errors import FormatError
from vllm_dfloat.integration.layers import method
from vllm_dfloat.integration.seam.prefetcher import PackedPrefetcher

ROWS, COLS = 8, 256
NUM_BLOCKS = 5


def weight(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, COLS, generator=generator) * 0.02).to(torch.bfloat16)


class Block(torch.nn.Module):
    """A transformer block with one compressed layer; a pass notes what it decodes, or that the layer was refused."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.proj = torch.nn.Linear(COLS, ROWS, bias=False, device="meta")
        self.seen: list[torch.Tensor | None] = []

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.cuda.main.add(self._read)
        return hidden_states

    def _read(self) -> None:
        out = torch.empty(2048, dtype=torch.bfloat16)
        try:
            ops.launch_decode(
                self.proj.__dict__[method.DESC], ROWS, COLS, out, torch.empty(1, dtype=torch.int32)
            )
        except FormatError:
            self.seen.append(None)
        else:
            self.seen.append(out.view(ROWS, COLS))


class _Driver:
    def cudaHostRegister(self, *args: int) -> int:
        return 0

    def cudaHostUnregister(self, *args: int) -> int:
        return 0


class Model:
    """Blocks whose layers are all offloaded, on an emulated device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, step: int) -> None:
        self.cuda = Cuda(monkeypatch, seed)
        self.offloader = PackedPrefetcher(PrefetchOffloader(1, 1, step), lambda host: host)
        set_offloader(self.offloader)
        self.blocks: Any = self.offloader.wrap_modules(Block(self.cuda) for _ in range(NUM_BLOCKS))
        self.give(0)
        self.offloader.post_init()

    def give(self, first: int) -> None:
        for i, block in enumerate(self.blocks):
            method.hold(block.proj, ops.pack(weight(first + i), f"w{i}"))

    def run(self) -> None:
        x = torch.zeros(1)
        for block in self.blocks:
            block(x)

    def captured(self) -> Any:
        """Capture a pass as vLLM does."""
        self.offloader.sync_prev_onload()
        with self.cuda.capture() as graph:
            self.run()
            self.offloader.join_after_forward()
        return graph

    def replay(self, graph: Any) -> None:
        self.offloader.sync_prev_onload()
        self.cuda.replay(graph)

    def seen(self) -> list[list[torch.Tensor | None]]:
        """Run all that waits; return what each block has decoded since the last call, and forget it."""
        self.cuda.drain()
        found = [block.seen for block in self.blocks]
        for block in self.blocks:
            block.seen = []
        return found


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = get_offloader()
    monkeypatch.setattr(host_arena, "_cudart", _Driver)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(
        PackedPrefetcher,
        "on_host",
        lambda self, num_rows: torch.zeros(num_rows, 4, dtype=torch.int64),
    )
    yield
    set_offloader(before)


def are_right(seen: list[list[torch.Tensor | None]], passes: int, first: int = 0) -> bool:
    return all(
        len(found) == passes
        and all(one is not None and torch.equal(one, weight(first + i)) for one in found)
        for i, found in enumerate(seen)
    )


@pytest.mark.parametrize("step", [1, 2, 3, NUM_BLOCKS])
@pytest.mark.parametrize("seed", range(5))
def test_every_pass_reads_its_own_weights_in_whatever_order_streams_run(
    step: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch, seed, step)
    for _ in range(3):
        model.run()
    assert are_right(model.seen(), 3)
    graph = model.captured()
    assert are_right(model.seen(), 0)
    model.replay(graph)
    model.replay(graph)
    model.run()
    model.replay(graph)
    assert are_right(model.seen(), 4)


@pytest.mark.parametrize("step", [1, 2])
def test_a_captured_graph_copies_new_weights(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, 0, step)
    model.run()
    graph = model.captured()
    model.replay(graph)
    model.cuda.drain()
    model.seen()
    model.give(10)
    model.replay(graph)
    model.run()
    model.replay(graph)
    assert are_right(model.seen(), 3, first=10)


@pytest.mark.parametrize("seed", range(10))
def test_without_waits_a_layer_is_refused_or_right(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: a descriptor that is right before its payload is there, or after another's has begun to come.
    model = Model(monkeypatch, seed, 1)
    monkeypatch.setattr(model.offloader, "_wait_for_layer", lambda layer_idx: None)
    for _ in range(3):
        model.run()
    seen = model.seen()
    assert any(one is None for found in seen for one in found)
    for i, found in enumerate(seen):
        assert all(one is None or torch.equal(one, weight(i)) for one in found)
