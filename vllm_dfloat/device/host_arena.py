"""Payloads in host memory that a device reads in place, so that they take no memory of the device.

On a GPU the memory is pinned, and a payload is a tensor of the GPU at the address by which the GPU reads it over PCIe.
No kernel sees a difference. On a CPU it is plain memory. Every payload has pages of its own, exactly as many as it
needs, which go back to the system when it dies. One large buffer would waste more: sizes are known only as weights
arrive, PyTorch's allocator of pinned memory takes powers of two, and new weights may need a larger place.
"""

import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dfloat.device.host_memory import available_bytes
from vllm_dfloat.errors import DeviceError

KEPT_FREE = 256 << 20  # host memory that is left to everything else
_ADVICE = "Offload less, or give the host more memory."

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HostMemory:
    """Memory of the host.

    Attributes:
        host: uint8 [n], on the CPU.
        shown: the same memory as a tensor of the device that reads it, as long as which it lives; on a CPU `host`.
    """

    host: torch.Tensor
    shown: torch.Tensor


class HostArena:
    """Payloads of one process in host memory.

    Attributes:
        num_bytes: of the payloads that are alive.
    """

    def __init__(self, view: View | None, available: Callable[[], int] = available_bytes) -> None:
        """Allocate nothing yet.

        Args:
            view: returns the GPU's tensor of the same memory, for a tensor in pinned host memory; None on a CPU.
            available: returns the bytes that the host can still give.
        """
        self.num_bytes = 0
        self._view, self._available = view, available
        self._sizes: dict[int, int] = {}

    def holds(self, payload: torch.Tensor) -> bool:
        """Return whether this is a payload that `put` returned."""
        return payload.data_ptr() in self._sizes

    def check_room(self, num_bytes: int, name: str) -> None:
        """Check that the host has this many bytes.

        Args:
            name: what they are for, for the message.

        Raises:
            DeviceError: it does not.
        """
        found = self._available()
        if num_bytes + KEPT_FREE > found:
            raise DeviceError(
                f"{name}: {num_bytes} bytes for the host's memory, of which {found} are available; expected "
                f"{KEPT_FREE} to be left besides. {_ADVICE}"
            )

    def put(self, payload: torch.Tensor, name: str = "") -> torch.Tensor:
        """Copy a payload to host memory and return it there, as a tensor of its old device.

        Args:
            payload: uint8 [n], n > 0; waited for if it lies on a GPU.
            name: the tensor's name, for messages.

        Raises:
            DeviceError: the host has no room, or the GPU's driver refuses to pin the memory.
        """
        memory = self.allocate(payload.nbytes, name)
        memory.host.copy_(payload)
        return memory.shown

    def allocate(self, num_bytes: int, name: str = "") -> HostMemory:
        """Return new memory of the host.

        Args:
            num_bytes: at least one.
            name: the tensor that it is for, for messages.

        Raises:
            DeviceError: the host has no room, or the GPU's driver refuses to pin the memory.
        """
        self.check_room(num_bytes, name or "a packed tensor")
        host = _pages(num_bytes)
        held = self._shown_to_gpu(host, name)
        address = held.data_ptr()
        self._sizes[address] = num_bytes
        self.num_bytes += num_bytes
        ending = weakref.finalize(held, self._release, address, host if held is not host else None)
        ending.atexit = False  # the process's end frees everything; the driver may be gone by then
        return HostMemory(host, held)

    def _shown_to_gpu(self, host: torch.Tensor, name: str) -> torch.Tensor:
        """Pin pages and return the GPU's tensor of them; on a CPU return them."""
        if self._view is None:
            return host
        _pin(host, name)
        try:
            return self._view(host)
        except BaseException:
            _cudart().cudaHostUnregister(host.data_ptr())
            raise

    def _release(self, address: int, host: torch.Tensor | None) -> None:
        self.num_bytes -= self._sizes.pop(address)
        if host is not None:
            _cudart().cudaHostUnregister(host.data_ptr())


def _pages(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes] in pages of its own, which the system gets back when the tensor dies."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _pin(host: torch.Tensor, name: str) -> None:
    """Pin memory for the GPU.

    Raises:
        DeviceError: the driver refuses.
    """
    error = int(_cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    if error or not host.is_pinned():
        raise DeviceError(
            f"{name or 'a packed tensor'}: the driver refused to pin {host.nbytes} bytes of host memory: "
            f"cudaHostRegister says {error}; expected 0. {_ADVICE}"
        )


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
