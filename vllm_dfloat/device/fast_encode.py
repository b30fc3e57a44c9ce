"""Encode one BF16 matrix into the fast layout with PyTorch's own operations, on the device where it lies.

The host waits for 128 counts, and for the number of entries. Temporary arrays take about 40 bytes per weight of
`CHUNK_WEIGHTS`, whatever the size of the matrix.
"""

from collections.abc import Iterator

import torch

from vllm_dfloat.codec.fast_layout import (
    BYTE_ORDER,
    CODES,
    HALF,
    MAX_ENTRIES,
    MAX_ESCAPES,
    RAW_ENTRIES,
    TILE_COLS,
    TILE_ROWS,
    TILE_WEIGHTS,
    FastLayout,
    half_base_of,
)

CHUNK_WEIGHTS = 1 << 24


def encode(
    weight: torch.Tensor, *, must_be_small: bool = True
) -> tuple[FastLayout, torch.Tensor] | None:
    """Return the fast layout and the payload of a matrix; None where it would take 14 bits per weight or more.

    Args:
        weight: BF16 [rows, cols], contiguous, on any device; any bit pattern.
        must_be_small: if not, only a matrix without elements, or with too many entries for 32 bits, gives None.

    Returns:
        The layout, and uint8 [layout.num_bytes] on the matrix's device.
    """
    weight = weight.detach()
    half_base = half_base_of(_counts(weight))
    rows, cols = weight.shape
    plan = FastLayout(rows, cols, 2 * half_base, 0)
    if not plan.numel or (must_be_small and not plan.is_small):
        return None
    escapes = _escapes_per_tile(weight, plan)
    is_raw = escapes > MAX_ESCAPES
    sizes = torch.where(is_raw, RAW_ENTRIES, escapes)
    layout = FastLayout(rows, cols, 2 * half_base, int(sizes.sum()))
    if (must_be_small and not layout.is_small) or layout.num_entries >= MAX_ENTRIES:
        return None
    payload = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=weight.device)
    starts = torch.zeros(layout.num_tiles + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    _section(payload, layout.starts_offset, starts.numel()).copy_(starts)
    _write(weight, layout, payload, starts, is_raw)
    return layout, payload


def _section(payload: torch.Tensor, offset: int, numel: int) -> torch.Tensor:
    """Return a section of words as int32 [numel]."""
    return payload[offset : offset + 4 * numel].view(torch.int32)


def _chunks(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row of each chunk, some rows of tiles, and its bytes: uint8 [rows, cols, 2], low byte first."""
    rows, cols = weight.shape
    step = max(1, CHUNK_WEIGHTS // (cols * TILE_ROWS)) * TILE_ROWS
    for first in range(0, rows, step):
        part = weight[first : first + step].contiguous()
        yield first, part.view(torch.uint8).view(*part.shape, 2)


def _counts(weight: torch.Tensor) -> list[int]:
    """Return how often the upper 7 exponent bits have each value."""
    counts = torch.zeros(128, dtype=torch.int64, device=weight.device)
    if weight.numel():
        for _, both in _chunks(weight):
            counts += torch.bincount((both[..., 1] & 0x7F).flatten(), minlength=128)
    return [int(count) for count in counts.tolist()]


def _distance(high: torch.Tensor, layout: FastLayout) -> torch.Tensor:
    """Return the distance from the base modulo 256, uint8; 8 or more for an escape."""
    return (high & 0x7F) - layout.base // 2


def _tiled(values: torch.Tensor, layout: FastLayout) -> torch.Tensor:
    """Return [rows, cols] as [rows of tiles, columns of tiles, 64, 128], filled up with zeros."""
    rows, cols = values.shape
    fill = (0, layout.tile_cols * TILE_COLS - cols, 0, -rows % TILE_ROWS)
    padded = torch.nn.functional.pad(values, fill)
    return padded.view(-1, TILE_ROWS, layout.tile_cols, TILE_COLS).transpose(1, 2)


def _escapes_per_tile(weight: torch.Tensor, layout: FastLayout) -> torch.Tensor:
    """Return the number of escapes of each tile, int64 [num_tiles]."""
    found = [
        _tiled(_distance(both[..., 1], layout) >= CODES, layout).sum((2, 3)).flatten()
        for _, both in _chunks(weight)
    ]
    return torch.cat(found)


def _write(
    weight: torch.Tensor,
    layout: FastLayout,
    payload: torch.Tensor,
    starts: torch.Tensor,
    is_raw: torch.Tensor,
) -> None:
    """Write both planes, escapes and raw tiles into a payload of zeros."""
    pitch, groups = layout.pitch, layout.num_groups
    low_plane = payload[: layout.high_offset].view(layout.rows, pitch)
    high_end = layout.high_offset + layout.rows * pitch // 2
    high_plane = payload[layout.high_offset : high_end].view(layout.rows, groups * HALF)
    entries = _section(payload, layout.entries_offset, layout.num_entries)
    order = torch.tensor(BYTE_ORDER, device=weight.device)
    fill = (0, pitch - layout.cols)
    for first, both in _chunks(weight):
        last = first + both.shape[0]
        low = torch.nn.functional.pad(both[..., 0], fill).view(-1, 4)[:, order]
        low_plane[first:last] = low.view(-1, pitch)
        distance = _distance(both[..., 1], layout)
        nibbles = (both[..., 1] & 0x80) | (distance & (CODES - 1))
        nibbles = torch.nn.functional.pad(nibbles, fill).view(-1, 2, 4)[:, :, order]
        high_plane[first:last] = _joined(nibbles).view(-1, groups * HALF)
        tile = first // TILE_ROWS * layout.tile_cols
        some = slice(tile, tile + -(-both.shape[0] // TILE_ROWS) * layout.tile_cols)
        bits = _tiled(both.view(torch.int16)[..., 0], layout)
        is_escape = _tiled(distance >= CODES, layout)
        _write_entries(bits, is_escape, is_raw[some], starts[some], entries)


def _joined(nibbles: torch.Tensor) -> torch.Tensor:
    """Return the bytes of words of nibbles, uint8 [n, 4]: the first four, or'ed with the others rotated left by 4 bits.

    Args:
        nibbles: uint8 [n, 2, 4], sign in bit 7 and distance in bits 2 to 0.
    """
    first, second = nibbles[:, 0], nibbles[:, 1]
    signs = torch.roll(second, 1, dims=1) >> 4
    return first | ((second << 4) & 0x70) | (signs & 0x08)


def _write_entries(
    bits: torch.Tensor,
    is_escape: torch.Tensor,
    is_raw: torch.Tensor,
    starts: torch.Tensor,
    entries: torch.Tensor,
) -> None:
    """Write the escapes and the raw tiles of a chunk.

    Args:
        bits: int16 [rows of tiles, columns of tiles, 64, 128].
        is_escape: bool, of the same shape.
        is_raw, starts: of these tiles.
        entries: int32, of the whole matrix.
    """
    flat = bits.reshape(-1, TILE_WEIGHTS)
    listed = is_escape.reshape(-1, TILE_WEIGHTS) & ~is_raw[:, None]
    tile, position = listed.nonzero(as_tuple=True)
    counts = listed.sum(1)
    before = counts.cumsum(0) - counts
    place = starts[tile] + torch.arange(tile.numel(), device=tile.device) - before[tile]
    entries[place] = (position.to(torch.int32) << 16) | (
        flat[tile, position].to(torch.int32) & 0xFFFF
    )
    raw = is_raw.nonzero()[:, 0]
    words = torch.arange(RAW_ENTRIES, device=raw.device)
    entries[starts[raw][:, None] + words] = flat[raw].view(torch.int32)
