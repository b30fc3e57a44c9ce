"""Encode one BF16 matrix on its device with kernels/packed_encode.py; the host makes the Huffman code.

The host waits for 256 counts, and for the number of words. The payload is allocated once, in its exact size. Temporary
arrays take 28 bytes per tile of 4096 bytes of BF16.
"""

from dataclasses import replace
from types import ModuleType

import numpy as np
import torch

from vllm_dfloat.codec.arrays import U8Array, U32Array
from vllm_dfloat.codec.encode import filler, layout_for
from vllm_dfloat.codec.huffman import build_lut, canonical_codes, choose_code
from vllm_dfloat.codec.layout import LANES, TILE_WEIGHTS, PackedLayout
from vllm_dfloat.device import exponents
from vllm_dfloat.device.checks import needing_triton


def encode(weight: torch.Tensor, name: str = "") -> tuple[PackedLayout, torch.Tensor]:
    """Return the packed layout and the payload of a matrix: the same bytes as from vllm_dfloat.codec.encode.

    Args:
        weight: BF16 [rows, cols] on a GPU, or on a CPU where Triton interprets its kernels. It is copied if it is not
            contiguous or does not start on a multiple of 16 bytes.
        name: the tensor's name, for messages.

    Returns:
        The layout, and uint8 [layout.num_bytes] on the matrix's device.

    Raises:
        DeviceError: Triton is not installed, or the device counted another number of weights.
        UnsupportedError: over 2**31 words of code.
    """
    with needing_triton(weight.device):
        from vllm_dfloat.kernels import packed_encode as kernels
    with torch.cuda.device(weight.device if weight.is_cuda else -1):  # -1 changes nothing
        return _encode(kernels, weight, name)


def _encode(
    kernels: ModuleType, weight: torch.Tensor, name: str
) -> tuple[PackedLayout, torch.Tensor]:
    device = weight.device
    rows, cols = weight.shape
    raw = PackedLayout(rows, cols, 0)
    flat = exponents.aligned(weight)
    body, tail = exponents.tiles(flat)
    full = body.numel() // TILE_WEIGHTS
    occurrences = exponents.occurrences(kernels, body, tail, raw.numel, name)
    num_fillers = raw.padded_numel - raw.numel
    code_bits, lengths = choose_code(occurrences)
    raw = replace(raw, code_bits=code_bits)
    if num_fillers:
        tail[-num_fillers:] = filler(lengths)
    table = torch.from_numpy(_table(lengths)).to(device)
    lane_lengths = torch.empty(raw.num_tiles, LANES, dtype=torch.uint8, device=device)
    tile_words = torch.empty(raw.num_tiles, dtype=torch.int32, device=device)
    kernels.measure(body, 0, table, lane_lengths, tile_words)
    kernels.measure(tail, full, table, lane_lengths, tile_words)
    ends = tile_words.cumsum(0, dtype=torch.int64)
    layout = layout_for(raw, int(ends[-1]) if full or tail.numel() else 0, name)
    if layout.is_raw:
        return layout, _raw(flat, layout)
    payload, sections = _payload(layout, lengths, lane_lengths, ends)
    kernels.write(body, 0, table, *sections)
    kernels.write(tail, full, table, *sections)
    return layout, payload


def _table(lengths: U8Array) -> U32Array:
    """Return the kernels' table: per exponent its code, left-aligned, and its length in the low 5 bits."""
    bits = lengths.astype(np.uint32)
    codes = canonical_codes(lengths).astype(np.uint32)
    return codes << (-bits & np.uint32(31)) | bits


def _raw(flat: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    payload = torch.empty(layout.num_bytes, dtype=torch.uint8, device=flat.device)
    payload.view(flat.dtype)[: flat.numel()] = flat
    payload[2 * flat.numel() :] = 0
    return payload


def _payload(
    layout: PackedLayout, lengths: U8Array, lane_lengths: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return a payload without codes, signs and mantissas, and the sections that the write kernel takes."""
    payload = torch.empty(layout.num_bytes, dtype=torch.uint8, device=ends.device)
    lut, plane, lane_section, starts, words = payload.tensor_split(
        (
            layout.sign_mantissa_offset,
            layout.lane_lengths_offset,
            layout.tile_starts_offset,
            layout.words_offset,
        )
    )
    lut.copy_(torch.from_numpy(build_lut(lengths, layout.code_bits).view(np.uint8)))
    lane_section.view_as(lane_lengths).copy_(lane_lengths)
    starts.zero_()
    words.zero_()
    starts = starts.view(torch.int32)
    starts[1 : 1 + ends.numel()] = ends
    return payload, (lane_section, starts, plane.view(torch.uint32), words.view(torch.uint32))
