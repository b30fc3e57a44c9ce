"""Tensors between inaccessible pages: an access past their end, or before their begin, kills the process.

For code that runs in a separate process (`run_python`).
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from compiled_target import TARGET

_keep: list[mmap.mmap] = []  # the memory of all tensors given out


def guarded(array: np.ndarray, at_end: bool = True) -> torch.Tensor:
    """Return a copy of `array` that ends where a page without any access rights begins, or begins where one ends.

    Compiled kernels take tensors that begin on multiples of 16 bytes, as on a GPU.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = max(1, -(-array.nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
    _keep.append(memory)
    base = np.frombuffer(memory, np.uint8)
    for guard in (0, size + mmap.PAGESIZE):
        assert libc.mprotect(base.ctypes.data + guard, mmap.PAGESIZE, 0) == 0
    before = size - array.nbytes if at_end else 0
    first = mmap.PAGESIZE + (before // 16 * 16 if TARGET else before)
    view = base[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return torch.from_numpy(view)


def run_python(code: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run `code`, which can import the tests' modules and those of scripts, in a separate process."""
    tests = Path(__file__).parent
    folders = str(tests), str(tests.parent / "scripts"), os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(folders)
    if env.get("TRITON_INTERPRET") == "1":
        kernels = "ptx_plugin" if TARGET else "quick_interpreter; quick_interpreter.install()"
        code = f"import {kernels}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
