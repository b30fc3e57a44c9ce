"""Launch parameters per device: the one table that the launchers read. Nothing is tuned while serving.

`python scripts/tune_kernels.py` tries the candidates on the current GPU and prints an entry to paste here. No parameter
changes a bit of a decoded weight; those of the fused kernel may change the order of its additions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_dfloat.kernels.fast_product import TALL_BANDS, Choice, DotShape, FastProduct, GemvShape

HOPPER = FastProduct()


@dataclass(frozen=True)
class LaunchConfig:
    """How the kernels are launched on one kind of device.

    Attributes:
        decode_tiles_per_program: tiles per program of the packed decode kernel, two per warp; a power of two. On an
            H100 2 take 84 us where 4 take 88 and 8 take 108: fewer warps at a time leave each more of the L1 cache.
        chosen_programs: most programs of the kernel that decodes chosen experts (expert_decode.py); about four times as
            many as run at once, so that the last ones end together.
        dfloat11_num_warps: warps of a program that decodes a block of the official layout; with 4, look-ups of 4
            windows overlap in a thread, and nothing spills.
        fused_gemv_tiles_per_program: tiles per program of the fused kernel, two per warp.
        fused_max_rows: largest number of rows of activations for which the packed kernel multiplies without decoding,
            for a matrix of any shape; at most 4. Measured on an H100 for four shapes of Llama 3.1 8B, when decoding was
            slower than now: the kernel took 0.4 to 0.7 of the time of decoding and cuBLAS. By arithmetic with today's
            decoding it takes 0.5 to 0.9, so 2 rows win for all four.
        fused_max_rows_if_large: the same for matrices of at least `fused_large_rows` rows; counts if it is more.
        fused_large_rows: measured likewise for 4 rows of activations: 0.6 of that time for 28672 x 4096, 0.7 for
            6144 x 4096, 0.9 and 1.06 for 4096 x 4096 and x 14336; by arithmetic 0.8, 0.9, 1.04 and 1.37 today.
        group_decode_max_numel: largest group, in weights, that one launch decodes; 0: a launch per layer.
        slab_bytes: bytes of a slab of an LM head, if no other matrix needs as much scratch. On an H100 the GEMM over
            slabs of 64 MiB gave the bits of the whole head of Llama 3.1 8B, for values as in a model; over 32 MiB it
            did not.
        slab_proof_work: floating-point operations for finding out which products by slab have these bits, at start;
            about 7 seconds of an H100.
        count_window_tiles_per_program: tiles per program of the windowed count kernel (encode_count.py); at most
            `MAX_WINDOW_TILES` are used.
        count_tiles_per_program: tiles per program of the histogram count kernel (encode_count.py).
        count_num_warps: warps per program of either count kernel.
        encode_tiles_per_program: tiles per program of the packed encode kernels, two per warp.
        dfloat11_encode_tiles_per_program: lanes per program of the official encode kernels, in multiples of 16.
        dfloat11_encode_num_warps: warps per program of the official encode kernels; 4 warps and 8 * 16 lanes give each
            thread one lane.
        dfloat11_split_weights: weights per program of the kernel that splits off signs and mantissas.
        fast_rows_per_program: rows per program of the fast decode kernel; a power of two that divides 64.
        fast_rows_at_once: rows of them at a time; divides them.
        fast_tiles_per_program: tiles of a row of tiles per program, 128 columns each; a power of two.
        fast_weights_at_once: weights of a thread at a time, 8 or 16.
        fast_num_warps: warps per program of the fast decode kernel.
        fast_encode_rows: rows of a tile at a time in the kernels that encode to the fast layout; divides 64.
        fast_product: which kernel multiplies by a matrix in the fast layout, see fast_product.py.
        fast_tokens_per_expert: up to so many tokens per expert, on average, experts in the fast layout are multiplied
            without decoding. Not measured: decoding moves 5.5 bytes a weight, the product 1.5 for 16 tokens.
        measured: False if the values are estimated, not measured; the lines of `fast_product` say so themselves.
    """

    decode_tiles_per_program: int = 2
    chosen_programs: int = 16_384
    dfloat11_num_warps: int = 4
    fused_gemv_tiles_per_program: int = 8
    fused_max_rows: int = 2
    fused_max_rows_if_large: int = 4
    fused_large_rows: int = 6144
    group_decode_max_numel: int = 0
    slab_bytes: int = 64 << 20
    slab_proof_work: int = 4 * 10**15
    count_window_tiles_per_program: int = 16
    count_tiles_per_program: int = 32
    count_num_warps: int = 4
    encode_tiles_per_program: int = 8
    dfloat11_encode_tiles_per_program: int = 8
    dfloat11_encode_num_warps: int = 4
    dfloat11_split_weights: int = 4096
    fast_rows_per_program: int = 16
    fast_rows_at_once: int = 4
    fast_tiles_per_program: int = 4
    fast_weights_at_once: int = 8
    fast_num_warps: int = 4
    fast_encode_rows: int = 16
    fast_product: FastProduct = HOPPER
    fast_tokens_per_expert: int = 16
    measured: bool = False

    def max_fused_rows(self, rows: int) -> int:
        """Return up to how many rows of activations a packed matrix of `rows` rows is multiplied without decoding."""
        is_large = rows >= self.fused_large_rows
        return max(self.fused_max_rows, self.fused_max_rows_if_large if is_large else 0)


DEFAULT = LaunchConfig()
# Triton's interpreter runs one program at a time, as NumPy calls: a few large programs are fastest.
INTERPRETED = LaunchConfig(
    decode_tiles_per_program=64,
    chosen_programs=4,
    slab_proof_work=3 * 10**10,
    fused_gemv_tiles_per_program=64,
    fused_max_rows=4,  # tests have small matrices
    dfloat11_encode_tiles_per_program=128,
    fast_rows_per_program=64,
    fast_rows_at_once=64,
    fast_tiles_per_program=8,
    fast_weights_at_once=16,
    fast_encode_rows=64,
    fast_product=FastProduct((*HOPPER.choices, Choice(256, TALL_BANDS, programs=16))),
)
# The same on every device: the shape of the statuses depends on the first; no other value of the second was tried.
ROWS_TILES_PER_PROGRAM = 2  # tiles per program of the kernel that decodes chosen rows: one warp
SUM_ROWS = 32  # output rows per program of the kernel that adds the fused kernel's partial sums
# The same on every device: of the kernel that decodes chosen rows of the fast layout; no other value was tried.
FAST_ROWS_TILES_PER_PROGRAM = 8
FAST_ROWS_NUM_WARPS = 2

# Products with the fast layout. Where no tensor cores work for a whole group of warps, the operands have another width.
_OF_WARPS = DotShape(width=4)
AMPERE = FastProduct(
    (
        Choice(4, GemvShape(), programs=330),
        Choice(32, _OF_WARPS, programs=384),
        Choice(64, _OF_WARPS, programs=256),
    )
)
# For 8 and 16 rows and large matrices, as the H200 does: its multiprocessors and clocks are the same, the two products
# compared took the same time on both (122 and 122 us, 123 and 122), and neither is limited by the memory.
_EIGHT, _SIXTEEN = DotShape(rows=32, warps=2, width=4), DotShape(rows=32, warps=1, width=4)
H100 = FastProduct(
    (
        Choice(4, GemvShape(), programs=330, measured=True),
        Choice(8, _EIGHT, programs=384, from_rows=16_384),
        Choice(16, _SIXTEEN, programs=384, from_rows=16_384),
        Choice(32, DotShape(), programs=384, measured=True),
        Choice(64, DotShape(), programs=256, measured=True),
    )
)
# Measured for 28672 x 4096 only; the other lines are the H100's. Beyond 32 rows decoding and cuBLAS take no longer, and
# are exact: at 64 rows the product took 178 us, cuBLAS 64 and decoding the packed layout 118; decoding the fast layout
# took 0.88 of that in an engine of 8B.
H200 = FastProduct(
    (
        Choice(1, GemvShape(), programs=3584, from_rows=16_384, measured=True),
        Choice(4, GemvShape(), programs=330),
        Choice(8, _EIGHT, programs=384, from_rows=16_384, measured=True),
        Choice(16, _SIXTEEN, programs=384, from_rows=16_384, measured=True),
        Choice(32, DotShape(), programs=384),
    )
)

# A part of the device's name, or its compute capability -> parameters. A name is preferred to a capability, the longest
# name to shorter ones; the default is used last.
CONFIGS: dict[str | tuple[int, int], LaunchConfig] = {
    (8, 0): LaunchConfig(fast_product=AMPERE),  # A100
    (8, 9): LaunchConfig(fast_product=AMPERE),  # Ada: L4, L40S, RTX 40
    (9, 0): LaunchConfig(),  # Hopper: H100, H200
    # 2026-11-27, driver 580.159.04, torch 2.11, Triton 3.6.0
    "NVIDIA H100 80GB HBM3": LaunchConfig(fast_product=H100, measured=True),
    # The same day and versions. chosen_programs was compared with others; what else differs between the two GPUs is the
    # memory, and decode took 0.82 to 0.86 of a copy's speed, as on the H100.
    "NVIDIA H200": LaunchConfig(fast_product=H200, measured=True),
    (10, 0): LaunchConfig(),  # Blackwell: B200
}


def config_for(device_name: str, capability: tuple[int, int] | None) -> LaunchConfig:
    """Return the launch parameters for a device.

    Args:
        device_name: the driver's name for the device, such as "NVIDIA H100 80GB HBM3".
        capability: its compute capability, such as (9, 0); None for an AMD GPU, whose numbers mean other things.
    """
    names = [key for key in CONFIGS if isinstance(key, str) and key in device_name]
    if names:
        return CONFIGS[max(names, key=len)]
    return DEFAULT if capability is None else CONFIGS.get(capability, DEFAULT)


_overriding: list[LaunchConfig] = []


@contextmanager
def override(config: LaunchConfig) -> Iterator[None]:
    """Use these parameters on every device inside the `with` statement, for tuning. One thread only."""
    _overriding.append(config)
    try:
        yield
    finally:
        _overriding.pop()


def config_of(device: torch.device) -> LaunchConfig:
    """Return the launch parameters for a torch device; makes CUDA calls only for a CUDA device."""
    return _overriding[-1] if _overriding else _config_of(device)


@lru_cache
def _config_of(device: torch.device) -> LaunchConfig:
    if device.type != "cuda":
        return INTERPRETED
    is_amd = torch.version.hip is not None
    capability = None if is_amd else torch.cuda.get_device_capability(device)
    return config_for(torch.cuda.get_device_name(device), capability)
