"""What the scripts that measure kernels share: where they can run, on what, and the weights they run on.

    python scripts/bench_setup.py [--device cpu]    # names GPU and versions; 2 and a sentence if none

PyTorch and Triton are imported only after `prepare` has checked that they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numba", "numpy", "safetensors")
POISON = 0x7FC1  # a NaN; no weight made here is NaN


class CannotRunError(Exception):
    """Something is missing here; its message is one sentence. Scripts exit with status 2."""


def prepare(device: str) -> torch.device:
    """Return the device to measure on and set up Triton for it: the GPU, or the CPU with Triton's interpreter.

    Raises:
        CannotRunError: a package or the GPU is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRunError(
            f"{sys.executable}: no package {', '.join(missing)}; needed are {', '.join(NEEDED)}. "
            "Install what is missing."
        )
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    os.environ["VLLM_DFLOAT_BACKEND"] = "triton"
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import torch

    if device == "cpu":
        let_interpreter_count()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotRunError(
            f"torch {torch.__version__}: no CUDA device is available; an NVIDIA GPU and its driver are needed. "
            "Run on a GPU host, or rehearse with --device cpu."
        )
    found = torch.device("cuda", torch.cuda.current_device())
    from vllm_dfloat import errors
    from vllm_dfloat.device import ops

    try:
        ops.check_device(found)
    except errors.DeviceError as error:
        raise CannotRunError(str(error)) from error
    return found


def let_interpreter_count() -> None:
    """Let Triton's interpreter loop up to a number that a kernel has computed, whatever NumPy is installed.

    Before 3.8 it makes int() of an array of one element, which NumPy refuses from 2.4 on.
    """
    from triton.runtime import interpreter

    module: Any = interpreter
    patch = module._patch_lang_tensor

    def patched(tensor: Any, *arguments: Any) -> None:
        patch(tensor, *arguments)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    module._patch_lang_tensor = patched


def environment(device: torch.device) -> dict[str, Any]:
    """Return the context of the measured numbers: device, driver, versions, commit, date, command."""
    import torch
    import triton

    facts: dict[str, Any] = {
        "device": "Triton's interpreter on a CPU; its times say nothing about a GPU",
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "driver": (_output(query) or "unknown").splitlines()[0],
        }
    return facts


def commit() -> str | None:
    """Return the commit from git, or VLLM_DFLOAT_COMMIT if files were copied without .git."""
    return os.environ.get("VLLM_DFLOAT_COMMIT") or _output(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    )


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return result.stdout.strip() or None if result.returncode == 0 else None


def normal(rows: int, cols: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return weights N(0, 0.02), BF16 [rows, cols]; they compress about as well as trained weights."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 0.02, generator=generator)


def copy_of(packed: Any) -> Any:
    """Return a copy of a packed weight, with its own payload at another address."""
    from dataclasses import replace

    from vllm_dfloat.device.packed_weight import make_descriptor

    payload = packed.payload.clone()
    desc = make_descriptor(payload, packed.fields, packed.size)
    return replace(packed, payload=payload, desc=desc)


def poisoned(numel: int, device: torch.device) -> torch.Tensor:
    """Return BF16 [numel] filled with `POISON`."""
    import torch

    return torch.full((numel,), POISON, dtype=torch.int16, device=device).view(torch.bfloat16)


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fill memory that an op allocates for its result with NaN; no weight made here is NaN."""
    import torch

    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    try:
        print(json.dumps(environment(prepare(args.device))))
    except CannotRunError as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
