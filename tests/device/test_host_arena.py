"""Payloads in host memory: the same bytes in pages of their own, and nothing is allocated that the host cannot give."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from vllm_dfloat.codec.layout import ALIGNMENT
from vllm_dfloat.device import host_arena
from vllm_dfloat.device.host_arena import KEPT_FREE, HostArena
from vllm_dfloat.device.host_memory import available_bytes
from vllm_dfloat.errors import DeviceError

PAYLOAD = torch.arange(5000, dtype=torch.int64).view(torch.uint8)


def test_payload_is_copied_and_counted_until_it_dies() -> None:
    arena = HostArena(None)
    held = arena.put(PAYLOAD, "a")
    other = arena.put(PAYLOAD[:100], "b")
    assert torch.equal(held, PAYLOAD)
    assert held.data_ptr() != PAYLOAD.data_ptr()
    assert held.data_ptr() % mmap.PAGESIZE == other.data_ptr() % ALIGNMENT == 0
    assert arena.num_bytes == PAYLOAD.nbytes + 100
    assert arena.holds(held)
    assert not arena.holds(PAYLOAD)
    del held
    gc.collect()
    assert arena.num_bytes == 100
    assert arena.holds(other)


def test_memory_goes_back_to_the_system() -> None:
    # Bug caught: an arena that keeps its pages, or one page too many for each payload.
    arena, big = HostArena(None), torch.ones(64 << 20, dtype=torch.uint8)
    before = resident()
    held = arena.put(big)
    assert 60 << 20 < resident() - before < 70 << 20
    del held
    assert resident() - before < 4 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_host_without_room_is_refused_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = KEPT_FREE + PAYLOAD.nbytes - 1
    arena = HostArena(None, lambda: room)
    monkeypatch.setattr(host_arena, "_pages", lambda num_bytes: pytest.fail("allocated"))
    message = (
        f"gate_up: {PAYLOAD.nbytes} bytes for the host's memory, of which {room} are .*Offload less"
    )
    with pytest.raises(DeviceError, match=message):
        arena.put(PAYLOAD, "gate_up")
    assert arena.num_bytes == 0


class Runtime:
    """Stands for the CUDA runtime, which this machine lacks: it pins what it is told to."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.error:
            self.pinned[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


def test_a_gpu_gets_a_view_of_pinned_pages_that_are_unpinned_when_it_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    monkeypatch.setattr(host_arena, "_cudart", lambda: runtime)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() in runtime.pinned)
    arena = HostArena(lambda host: host.view(torch.uint8))
    held = arena.put(PAYLOAD)
    assert runtime.pinned == {held.data_ptr(): PAYLOAD.nbytes}
    assert torch.equal(held, PAYLOAD)
    del held
    assert (runtime.pinned, arena.num_bytes) == ({}, 0)


def test_pages_that_the_gpu_cannot_be_shown_are_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(host_arena, "_cudart", lambda: runtime)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() in runtime.pinned)

    def fails(host: torch.Tensor) -> torch.Tensor:
        assert runtime.pinned
        raise OSError("no view")

    arena = HostArena(fails)
    with pytest.raises(OSError, match="no view"):
        arena.put(PAYLOAD)
    assert (runtime.pinned, arena.num_bytes) == ({}, 0)


def test_a_driver_that_does_not_pin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_arena, "_cudart", lambda: Runtime(error=2))
    arena = HostArena(lambda host: host)
    with pytest.raises(DeviceError, match=r"up: the driver refused to pin 40000 bytes .*says 2"):
        arena.put(PAYLOAD, "up")
    assert arena.num_bytes == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 3 << 20),
        ({"memory.max": "max\n", "memory.current": "5\n"}, 3 << 20),
        ({"memory.max": "2000000", "memory.current": "1500000"}, 500_000),
        (
            {
                "memory.max": "2000000",
                "memory.current": "1500000",
                "memory.stat": "anon 1\ninactive_file 200000\n",
            },
            700_000,
        ),
        ({"memory.max": "1", "memory.current": "1500000"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000000",
                "memory/memory.usage_in_bytes": "400000",
                "memory/memory.stat": "total_inactive_file 50\n",
            },
            600_050,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "4",
            },
            3 << 20,
        ),
    ],
)
def test_available_memory_is_that_of_the_system_and_of_the_container(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree:  1 kB\nMemAvailable:    3072 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path, tmp_path) == expected
