"""Encode one BF16 matrix into the fast layout on its device with kernels/fast_encode.py; the host chooses the base.

The host waits for 256 counts, and for the number of entries. The payload is allocated once, in its exact size.
Temporary arrays take 12 bytes per tile of 16 KiB of BF16.
"""

from types import ModuleType

import torch

from vllm_dfloat.codec.fast_layout import MAX_ENTRIES, FastLayout, half_base_of
from vllm_dfloat.device import exponents
from vllm_dfloat.device.checks import needing_triton


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
