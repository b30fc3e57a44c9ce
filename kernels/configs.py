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
        group_decode_max_numel: largest group, in weights, that one launch decodes; 0: a launch per layer.
        count_window_tiles_per_program: tiles that a program counts in a window (encode_count.py) before it adds its
            counts to the matrix's; at most `MAX_WINDOW_TILES`.
        count_tiles_per_program: the same for the other form.
        count_num_warps: warps of such a program, in both forms.
        encode_tiles_per_program: tiles of a program that encodes the packed layout, two a warp.
        dfloat11_encode_tiles_per_program: groups of 16 lanes of a program that encodes the official layout.
        dfloat11_encode_num_warps: warps of such a program; with 4 and 8 groups of lanes, a thread has one lane.
        dfloat11_split_weights: weights of which a program takes signs and mantissas.
        measured: False where the values are reasoned.
    """

    decode_tiles_per_program: int = 8
    dfloat11_num_warps: int = 4
    fused_gemv_tiles_per_program: int = 8
    fused_dot_rows: int = 16
    fused_dot_num_warps: int = 4
    fused_max_rows: int = 16
    group_decode_max_numel: int = 0
    count_window_tiles_per_program: int = 16
    count_tiles_per_program: int = 32
    count_num_warps: int = 4
    encode_tiles_per_program: int = 8
    dfloat11_encode_tiles_per_program: int = 8
    dfloat11_encode_num_warps: int = 4
    dfloat11_split_weights: int = 4096
    measured: bool = False


DEFAULT = LaunchConfig()
# Triton's interpreter runs a program at a time, each as NumPy calls: few large programs.
INTERPRETED = LaunchConfig(
    decode_tiles_per_program=64,
    fused_gemv_tiles_per_program=64,
    dfloat11_encode_tiles_per_program=128,
)
# The same on every device: the first is part of a shape, the second was never tried otherwise.
ROWS_TILES_PER_PROGRAM = 2  # of a program that decodes chosen rows: one warp
SUM_ROWS = 32  # output rows of a program that adds the partial sums of the fused kernel

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
