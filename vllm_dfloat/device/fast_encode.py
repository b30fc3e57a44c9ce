"""Encode one BF16 matrix into the fast layout on its device with kernels/fast_encode.py; the host chooses the base.

The host waits for 256 counts, and for the number of entries. The payload is allocated once, in its exact size.
Temporary arrays take 12 bytes per tile of 16 KiB of BF16.
"""

import functools
from types import ModuleType

import numpy as np
import torch

from vllm_dfloat.codec import fast_reference
from vllm_dfloat.codec.arrays import U16Array
from vllm_dfloat.codec.fast_layout import (
    MAX_ENTRIES,
    TILE_COLS,
    TILE_ROWS,
    TILE_WEIGHTS,
    FastLayout,
    FastTensor,
    half_base_of,
)
from vllm_dfloat.device import exponents
from vllm_dfloat.device.checks import needing_triton
from vllm_dfloat.errors import DeviceError


def encode(
    weight: torch.Tensor, name: str = "", *, must_be_small: bool = True
) -> tuple[FastLayout, torch.Tensor] | None:
    """Return the fast layout and the payload of a matrix; None where it would take 14 bits per weight or more.

    The bytes are those of vllm_dfloat.codec.fast_encode.

    Args:
        weight: BF16 [rows, cols] on a GPU, or on a CPU where Triton interprets its kernels; any bit pattern. It is
            copied if it is not contiguous or does not start on a multiple of 16 bytes.
        name: the tensor's name, for messages.
        must_be_small: if not, only a matrix without elements, or with too many entries for 32 bits, gives None.

    Returns:
        The layout, and uint8 [layout.num_bytes] on the matrix's device.

    Raises:
        DeviceError: Triton is not installed, or the device counted another number of weights.
    """
    rows, cols = weight.shape
    plan = FastLayout(rows, cols, 0, 0)
    if not plan.numel or (must_be_small and not plan.is_small):
        return None
    with needing_triton(weight.device):
        from vllm_dfloat.kernels import encode_count, fast_encode
    with torch.cuda.device(weight.device if weight.is_cuda else -1):  # -1 changes nothing
        flat = exponents.aligned(weight)
        counts = exponents.occurrences(encode_count, *exponents.tiles(flat), plan.numel, name)
        half_base = half_base_of((counts[::2] + counts[1::2]).tolist())
        return _encode(fast_encode, flat.view(rows, cols), half_base, must_be_small)


def _encode(
    kernels: ModuleType, bits: torch.Tensor, half_base: int, must_be_small: bool
) -> tuple[FastLayout, torch.Tensor] | None:
    rows, cols = bits.shape
    num_tiles = FastLayout(rows, cols, 0, 0).num_tiles
    sizes = torch.empty(num_tiles, dtype=torch.int32, device=bits.device)
    kernels.measure(bits, half_base, sizes)
    ends = sizes.cumsum(0, dtype=torch.int64)
    layout = FastLayout(rows, cols, 2 * half_base, int(ends[-1]))
    if (must_be_small and not layout.is_small) or layout.num_entries >= MAX_ENTRIES:
        return None
    payload = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=bits.device)
    low = payload[: layout.high_offset]
    high = payload[layout.high_offset : layout.high_offset + rows * layout.pitch // 2]
    starts = payload[layout.starts_offset : layout.starts_offset + 4 * (num_tiles + 1)]
    starts.view(torch.int32)[1:] = ends
    entries = payload[layout.entries_offset : layout.entries_offset + 4 * layout.num_entries]
    sections = (section.view(torch.uint32) for section in (low, high, starts, entries))
    kernels.write(bits, half_base, *sections)
    return layout, payload


def _pattern(cols: int) -> U16Array:
    """Return a small matrix with a raw tile, escapes and partial tiles."""
    bits = np.full((TILE_ROWS + 6, cols), 0x3C12, np.uint16)
    spread = np.arange(TILE_WEIGHTS, dtype=np.uint16) * np.uint16(7)
    bits[:TILE_ROWS, :TILE_COLS] = spread.reshape(TILE_ROWS, TILE_COLS)
    bits[1, TILE_COLS + 2], bits[TILE_ROWS + 1, 3], bits[-1, -1] = 0, 0xFF80, 1
    return bits


@functools.cache
def check_encoder(device: torch.device) -> None:
    """Encode two small matrices and decode them on the host, once for a device: it may compile the kernels wrongly.

    Raises:
        DeviceError: a bit differs.
    """
    for cols in (TILE_COLS + 8, TILE_COLS + 5):  # of both forms of the kernels
        bits = _pattern(cols)
        weight = torch.from_numpy(bits.view(np.int16)).to(device).view(torch.bfloat16)
        found = encode(weight, "a test pattern", must_be_small=False)
        held = None if found is None else FastTensor(found[0], found[1].cpu().numpy())
        if held is None or not np.array_equal(fast_reference.decode(held), bits):
            raise DeviceError(
                f"{device}: encodes a test pattern wrongly into the fast layout. Its driver, Triton or memory cannot "
                "be trusted; use layout packed, or run scripts/gpu_verdict.sh."
            )
