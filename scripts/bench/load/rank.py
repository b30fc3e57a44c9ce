"""Load one rank of a tensor-parallel model with vLLM's own loader, alone in this process, and print what it took.

    python scripts/bench/load/rank.py MODEL [--quantization dfloat11] [--tp 8] [--rank 0] [--enable-expert-parallel]

The process is a process group of one that claims to be rank R of N. While a model loads, layers, weight loaders and
vocabulary shards ask the group only for these two numbers, so they load exactly the shards of that rank. The script
prints one line of JSON.

Memory on a CPU is anonymous memory (RssAnon), sampled every 5 ms, minus that at the start. Pages of mapped files are
not counted; the system drops them when it needs room. On a GPU it is PyTorch's peak.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SAMPLED_EVERY = 0.005  # seconds
_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status: no RssAnon; a Linux kernel since 4.5 has it.")


def read_bytes() -> int:
    """Return the bytes that this process has read from storage so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class HostPeak:
    """Measures the highest anonymous memory between entry and exit, minus that at entry."""

    def __enter__(self) -> HostPeak:
        # Otherwise the C library keeps freed memory, which would count as used.
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 256 * 1024)
        self._start = self._highest = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLED_EVERY):
            self._highest = max(self._highest, anonymous_bytes())

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._highest = max(self._highest, anonymous_bytes())

    @property
    def num_bytes(self) -> int:
        return self._highest - self._start


def as_rank(rank: int, size: int, device: str) -> None:
    """Make a process group of one process that claims to be rank `rank` of `size`."""
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        parallel_state,
    )

    store = tempfile.mktemp(prefix="load-rank-")
    backend = "nccl" if device == "cuda" else "gloo"
    init_distributed_environment(1, 0, f"file://{store}", 0, backend=backend)
    initialize_model_parallel(1, 1)
    group = parallel_state.get_tp_group()
    group.world_size, group.rank_in_group = size, rank


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Load the rank's model; return seconds and bytes."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device == "cpu":
        torch.accelerator.empty_cache = lambda: None  # as in vLLM's CPU worker; torch's own raises
    config = EngineArgs(
        model=str(args.model),
        quantization=args.quantization,
        enable_expert_parallel=args.enable_expert_parallel,
        skip_tokenizer_init=True,
        max_model_len=128,
        enforce_eager=True,
    ).create_engine_config()
    compile_codecs()
    with set_current_vllm_config(config):
        as_rank(args.rank, args.tp, device)
        if device == "cuda":
            torch.cuda.set_device(0)
            torch.cuda.reset_peak_memory_stats()
        before, began = read_bytes(), time.perf_counter()
        with HostPeak() as host:
            model = get_model(vllm_config=config)
        seconds = time.perf_counter() - began
    result = {
        "seconds": round(seconds, 2),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else host.num_bytes,
        "host_peak_bytes": host.num_bytes,
        "read_bytes": read_bytes() - before,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    return result | held(model)


def compile_codecs() -> None:
    """Run the CPU codecs once, so that numba has allocated its memory before the measurement."""
    import numpy as np

    from vllm_dfloat.codec.decode import decode
    from vllm_dfloat.codec.encode import encode
    from vllm_dfloat.device import ops  # noqa: F401  # its library of ops too
    from vllm_dfloat.dfloat11.decode import decode_unit
    from vllm_dfloat.dfloat11.encode import as_unit, encode_unit

    bits = (np.random.default_rng(0).standard_normal((64, 4096), np.float32) * 0.02).view(np.uint32)
    weight = (bits >> 16).astype(np.uint16)
    decode(encode(weight))
    decode_unit(as_unit(encode_unit([weight], "warm-up"), "warm-up"))


def held(model: Any) -> dict[str, int]:
    """Return the bytes that the rank holds after loading, and those of its largest layer in BF16."""
    from vllm_dfloat.integration.layers.method import weights_of
    from vllm_dfloat.integration.loading.report import summarize

    summary = summarize(model)
    layers = [list(weights_of(module).values()) for module in model.modules()]
    packed = [weight for weights in layers for weight in weights]
    blocks = [w for w in packed if ".layers." in w.name]
    return {
        "bf16_bytes": summary.bf16_bytes,
        "held_bytes": summary.held_bytes,
        "scratch_bytes": summary.scratch_bytes,
        "largest_layer_bytes": max(map(_bf16_bytes, layers)),
        "block_bytes": sum(w.num_bytes for w in blocks),
        "block_bf16_bytes": _bf16_bytes(blocks),
        "checksums": sum(int(w.checksum) for w in packed),
    }


def _bf16_bytes(packed: list[Any]) -> int:
    return sum(2 * weight.rows * weight.cols for weight in packed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", choices=("dfloat11",))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    result = load(args)
    print(json.dumps(result), flush=True)
    os._exit(0)  # without destroying the false process group


if __name__ == "__main__":
    sys.exit(main())
