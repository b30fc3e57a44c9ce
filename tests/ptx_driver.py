"""A driver of Triton's for a GPU that is not there: kernels are compiled and launched as for one, and run as PTX.

All before the launch is Triton's own: what it specializes by the arguments, how it compiles, what it passes. Pointers
are those of CPU tensors, so a kernel reads and writes the memory of this process.
"""

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from ptx_banks import Banked
from ptx_program import Program
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

_FIRST = 4096  # address; none lies before
_END = 1 << 47
_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that a block may have
_MAX_THREADS = 1024
_TOGETHER = 8  # columns that the tensor cores add at a time


class _Memory:
    """The memory of this process from address _FIRST on, as NumPy wants to be told; nothing is read or copied."""

    __array_interface__: ClassVar[dict[str, Any]] = {
        "data": (_FIRST, False), "shape": (_END - _FIRST,), "typestr": "|u1", "version": 3,
    }  # fmt: skip


class _Machine(Banked):
    """One block of threads whose global memory is that of this process."""

    _elsewhere = np.zeros(2, np.uint64)  # read by threads that do not run

    def fetch(self, memory: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        if memory is not self.memory:
            return super().fetch(memory, address, size)
        active, self.active = self.active, np.ones_like(self.active)
        place = np.where(active, address, self._elsewhere.ctypes.data)
        found = super().fetch(memory, place - _FIRST, size)
        self.active = active
        return found

    def put(self, memory: np.ndarray, address: np.ndarray, value: np.ndarray, size: int) -> None:
        super().put(memory, address - _FIRST * (memory is self.memory), value, size)


class Launcher:
    """Runs the blocks of one kernel one after the other; what it begins is done no sooner than it waits for it."""

    program: Program

    def __init__(self, src: Any, metadata: Any) -> None:
        self._types, self._shared = list(src.signature.values()), metadata.shared

    def __call__(self, x: int, y: int, z: int, *given: Any) -> None:
        assert z == 1
        args = given[6:]  # behind stream, function, metadata and hooks
        parameters = [
            _word(kind, arg)
            for kind, arg in zip(self._types, args, strict=True)
            if kind != "constexpr"
        ]
        parameters += [0, 0]  # scratch memory, of which our kernels have none
        memory, rest = np.asarray(_Memory()), (self._shared, _TOGETHER, True)
        for block in np.ndindex(x, y):
            _Machine(self.program, memory, parameters, block, (x, y), *rest).run()


def _word(kind: str, arg: Any) -> int:
    """Return the bits of an argument."""
    if kind[0] == "*":
        return 0 if arg is None else int(arg.data_ptr())
    if kind[0] == "f":
        return int(np.float32(arg).view(np.uint32))
    return int(arg) % (1 << 64)


class PtxDriver:
    """What Triton asks a driver; `target` such as 90 for sm_90."""

    launcher_cls = Launcher

    def __init__(self, target: int) -> None:
        self._target = GPUTarget("cuda", target, 32)
        properties = {"max_shared_mem": _SHARED[target] << 10}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, binary, shared, device: (1, 1, 0, 0, _MAX_THREADS),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self._target.arch, 10)


def install(target: int) -> list[str]:
    """Let all kernels of this process run so from now on; return a list to which the name of each launched goes."""
    names: list[str] = []
    init = CompiledKernel._init_handles

    def init_handles(kernel: Any) -> None:
        init(kernel)
        run = kernel._run
        if isinstance(run, Launcher) and not hasattr(run, "program"):
            run.program = Program(kernel.asm["ptx"])
            names.append(kernel.name)

    CompiledKernel._init_handles = init_handles  # type: ignore[method-assign]
    driver.set_active(PtxDriver(target))
    return names
