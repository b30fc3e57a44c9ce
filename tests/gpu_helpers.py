"""Shared by the tests that need a GPU: when they run, and decoding into poisoned memory.

`VLLM_DFLOAT_GPU_REHEARSAL=1` runs those that can run on a CPU, in Triton's interpreter and with small sizes, so that
mistakes in a test are found before it runs on a rented GPU.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Bits, poisoned

from vllm_dfloat.device import ops

IS_REHEARSAL = os.environ.get("VLLM_DFLOAT_GPU_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if IS_REHEARSAL else "cuda")
HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") == "0"

if IS_REHEARSAL:
    os.environ["VLLM_DFLOAT_BACKEND"] = "triton"
    from bench_setup import let_interpreter_count

    let_interpreter_count()

# A module whose tests need a GPU sets `pytestmark` to this.
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (HAS_GPU or IS_REHEARSAL), reason="needs an NVIDIA GPU and TRITON_INTERPRET=0"
    ),
]
# In addition, for tests that the interpreter cannot run: CUDA graphs, gigabytes in reasonable time.
no_rehearsal = pytest.mark.skipif(IS_REHEARSAL, reason="needs an NVIDIA GPU")


def of_size(real: list[Any], small: list[Any]) -> list[Any]:
    """Return the parameters for a GPU, or those for a rehearsal."""
    return small if IS_REHEARSAL else real


@functools.lru_cache(maxsize=8)
def gaussian(rows: int, cols: int, seed: int = 0) -> Bits:
    """Return weights N(0, 0.02) like helpers.gaussian, made on the GPU and cached: a CPU takes 60 ms per million."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weights = torch.empty(rows, cols, dtype=torch.bfloat16, device=DEVICE)
    bits = weights.normal_(0, 0.02, generator=generator).cpu().view(torch.uint16).numpy()
    bits.flags.writeable = False  # the cache gives it to other tests too
    return np.asarray(bits)


def buffers(num_tiles: int, padded_numel: int, poison: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an output, BF16 [padded_numel], filled with `poison`, which a decode must overwrite, and status words."""
    status = torch.full((num_tiles,), -1, dtype=torch.int32, device=DEVICE)
    return poisoned((padded_numel,), poison, DEVICE), status


def decode(packed: ops.PackedWeight, poison: int, op: Any = ops.decode) -> torch.Tensor:
    """Return a matrix, decoded into poisoned memory; check every status."""
    rows, cols = packed.rows, packed.cols
    out, status = buffers(ops.num_tiles(rows, cols), ops.padded_numel(rows, cols), poison)
    op(packed.desc, rows, cols, out, status)
    assert not status.any()
    return out[: rows * cols].view(rows, cols)


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fill memory that an op allocates for its result with NaN."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def captured(work: Any) -> torch.cuda.CUDAGraph:
    """Return a graph of `work()`, which was called once before, so that its kernels are compiled."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
