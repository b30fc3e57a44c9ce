"""Launch parameters per device, as data: the one table that the launchers read. Nothing is tuned while serving.

`python scripts/tune_kernels.py` tries the candidates on the GPU at hand and prints an entry to paste here. No parameter
changes a bit of a decoded weight; those of the fused kernel may change the order of its additions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched on one kind of device.

    Attributes:
        decode_tiles_per_program: tiles of a program that decodes the packed layout, two a warp; a power of two.
        dfloat11_num_warps: warps of a program that decodes a block of the official layout; with 4, look-ups of 4
            windows overlap in a thread, and nothing spills.
        fused_gemv_tiles_per_program: tiles, two a warp, of a program of the fused kernel without tensor cores.
        fused_dot_rows: output rows of a program of the fused kernel with tensor cores.
        fused_dot_num_warps: warps of such a program.
        fused_max_rows: largest number of input rows for which the fused kernel is used; beyond it, decode then GEMM.
        block_decode_max_numel: transformer blocks of up to this many weights are decoded in one launch; 0: per layer.
        measured: False where the values are reasoned.
    """

    decode_tiles_per_program: int = 8
    dfloat11_num_warps: int = 4
    fused_gemv_tiles_per_program: int = 8
    fused_dot_rows: int = 16
    fused_dot_num_warps: int = 4
    fused_max_rows: int = 16
    block_decode_max_numel: int = 0
    measured: bool = False


DEFAULT = LaunchConfig()
# Triton's interpreter runs a program at a time, each as NumPy calls: few large programs.
INTERPRETED = LaunchConfig(decode_tiles_per_program=64, fused_gemv_tiles_per_program=64)

# A part of the device's name, or its compute capability -> parameters. A name goes before a capability, the longest
# name before the others, the default last.
CONFIGS: dict[str | tuple[int, int], LaunchConfig] = {
    (8, 0): LaunchConfig(),  # A100
    (8, 9): LaunchConfig(),  # Ada: L4, L40S, RTX 40
    (9, 0): LaunchConfig(),  # Hopper: H100, H200
    (10, 0): LaunchConfig(),  # Blackwell: B200
}


def config_for(device_name: str, capability: tuple[int, int]) -> LaunchConfig:
    """Return the launch parameters for a device.

    Args:
        device_name: as the driver calls it, such as "NVIDIA H100 80GB HBM3".
        capability: its compute capability, such as (9, 0).
    """
    names = [key for key in CONFIGS if isinstance(key, str) and key in device_name]
    if names:
        return CONFIGS[max(names, key=len)]
    return CONFIGS.get(capability, DEFAULT)


_overriding: list[LaunchConfig] = []


@contextmanager
def override(config: LaunchConfig) -> Iterator[None]:
    """Launch with these parameters on every device inside the `with` block: how tuning tries them. One thread only."""
    _overriding.append(config)
    try:
        yield
    finally:
        _overriding.pop()


def config_of(device: torch.device) -> LaunchConfig:
    """Return the launch parameters for a torch device; no CUDA call for any but a CUDA device."""
    return _overriding[-1] if _overriding else _config_of(device)


@lru_cache
def _config_of(device: torch.device) -> LaunchConfig:
    if device.type != "cuda":
        return INTERPRETED
    return config_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
