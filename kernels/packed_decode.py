"""Decode a matrix in the packed layout to BF16, or a run of its tiles, in one pass; the tiles are those of tiles.py.

One program decodes a few tiles, two per warp and one lane per thread, and stores 16 bytes for every 8 weights. There is
no counting pass; the only barrier is the one of the status word.
"""

import torch
import triton
import triton.language as tl

from vllm_dfloat.codec import descriptor, layout
from vllm_dfloat.kernels.configs import config_of
from vllm_dfloat.kernels.tiles import (
    LANES,
    NAN_PAIR,
    STATUS_DESCRIPTOR,
    STEPS,
    TILE_WEIGHTS,
    _exponents_of_eight,
    _four_words,
    _interleave,
    _merge,
    _open,
    _read,
    _section,
    _tile_status,
    num_warps,
)

SHORT_CODE_BITS = tl.constexpr(layout.MIN_CODE_BITS)  # as in nearly all matrices


@triton.jit
def _decode_coded(
    payload, sizes, tile, num_tiles, out_ptr, status_ptr, TILES: tl.constexpr,
    PER_WINDOW: tl.constexpr = 32 // layout.MAX_CODE_BITS,
):  # fmt: skip
    """Decode tiles int64 [TILES, 1] of a matrix held in codes, PER_WINDOW look-ups in a window of 32 bits."""
    lut, shift, plane, words, is_full, end, bit, word0, word1, word2 = _open(
        payload, sizes, tile, num_tiles
    )
    lane = tl.arange(0, LANES)[None, :]
    quad = tl.arange(0, 4)[None, None, :]
    out = out_ptr + (tile * (TILE_WEIGHTS // 2))[:, :, None]
    signs = plane[:, :, None] + (lane * 4)[:, :, None]
    sm0, sm1, sm2, sm3 = _four_words(signs, TILES)
    for half in range(STEPS // 2):
        # The next ones are on their way while these are used.
        following = tl.minimum(half + 1, STEPS // 2 - 1)
        next0, next1, next2, next3 = _four_words(signs + following * (LANES * 4), TILES)
        for k in tl.static_range(2):
            e0, e1, e2, e3, bit, word0, word1, word2 = _exponents_of_eight(
                words, bit, word0, word1, word2, lut, shift, PER_WINDOW
            )
            a, b = _merge(sm0 if k == 0 else sm2, e0, e1)
            c, d = _merge(sm1 if k == 0 else sm3, e2, e3)
            offset = ((lane + (half * 2 + k) * LANES) * 4)[:, :, None] + quad
            tl.store(out + offset, _interleave(a, b, c, d))
        sm0, sm1, sm2, sm3 = next0, next1, next2, next3
    tl.store(status_ptr + tile, _tile_status(bit, end, is_full))


@triton.jit
def _decode_tiles(
    desc_ptr, salt, tile, num_tiles, out_ptr, status_ptr, TILES: tl.constexpr, is_known=None,
    PER_WINDOW: tl.constexpr = 32 // layout.MIN_CODE_BITS,
):  # fmt: skip
    """Decode tiles int64 [TILES, 1] of one matrix; the pointers are those of `_decode_kernel`."""
    is_sound, payload, kind, sizes = _read(desc_ptr, salt, is_known)
    lane = tl.arange(0, LANES)[None, :]
    quad = tl.arange(0, 4)[None, None, :]
    out_base = out_ptr + (tile * (TILE_WEIGHTS // 2))[:, :, None]
    if is_sound & (kind == 0):
        if (sizes >> 32) <= SHORT_CODE_BITS:
            _decode_coded(payload, sizes, tile, num_tiles, out_ptr, status_ptr, TILES, PER_WINDOW)
        else:
            _decode_coded(payload, sizes, tile, num_tiles, out_ptr, status_ptr, TILES)
    elif is_sound:
        raw = _section(payload, 0, tl.uint32) + (tile * (TILE_WEIGHTS // 2))[:, :, None]
        for half in range(STEPS // 2):
            for k in tl.static_range(2):
                offset = ((lane + (half * 2 + k) * LANES) * 4)[:, :, None] + quad
                tl.store(out_base + offset, tl.load(raw + offset))
        tl.store(status_ptr + tile, tl.zeros_like(tile).to(tl.int32))
    else:
        nan = tl.full([TILES, LANES, 4], NAN_PAIR, tl.uint32)
        for step in range(STEPS):
            tl.store(out_base + ((lane + step * LANES) * 4)[:, :, None] + quad, nan)
        tl.store(status_ptr + tile, tl.full([TILES, 1], STATUS_DESCRIPTOR, tl.int32))


# Sizes are not specialized: a layer of another size must not compile another kernel while requests wait.
@triton.jit(do_not_specialize=["num_tiles", "salt"])
def _decode_kernel(
    desc_ptr,  # int64[4]                        see kernels/tiles.py
    out_ptr,  # uint32[num_tiles * 1024]        pairs of BF16, whole tiles
    status_ptr,  # int32[num_tiles]                0, or a sum of STATUS_* bits
    num_tiles,  # int32
    salt,  # int64                           of the seal, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
):
    """Decode TILES tiles per program to BF16.

    Equal bit for bit to `vllm_dfloat.codec.reference.decode`. Grid (ceil(num_tiles / TILES),).
    Reads about 10.8 bits and writes 16 per weight. Tiles past the end repeat the last tile: to write the same bits
    twice costs less than a mask on every store.
    """
    tile = (tl.program_id(0) * TILES + tl.arange(0, TILES))[:, None]
    tile = tl.minimum(tile, num_tiles - 1).to(tl.int64)  # times 2048 it passes 2**31
    num_tiles = num_tiles.to(tl.int64)
    _decode_tiles(desc_ptr, salt, tile, num_tiles, out_ptr, status_ptr, TILES)


@triton.jit(do_not_specialize=["num_tiles", "first", "count", "salt"])
def _decode_run_kernel(
    desc_ptr,  # int64[4]                        see kernels/tiles.py
    out_ptr,  # uint32[count * 1024]            pairs of BF16, whole tiles
    status_ptr,  # int32[count]                    0, or a sum of STATUS_* bits
    num_tiles,  # int32                          of the matrix
    first,  # int32                              the first tile wanted
    count,  # int32                              how many
    salt,  # int64                               of the seal, see vllm_dfloat/codec/descriptor.py
    TILES: tl.constexpr,
):
    """Decode tiles first to first + count - 1, TILES per program. Grid (ceil(count / TILES),)."""
    place = (tl.program_id(0) * TILES + tl.arange(0, TILES))[:, None]
    first = first.to(tl.int64)
    tile = first + tl.minimum(place, count - 1).to(tl.int64)
    # Where tile 0 of the matrix would be in the output.
    out_ptr -= first * (TILE_WEIGHTS // 2)
    status_ptr -= first
    _decode_tiles(desc_ptr, salt, tile, num_tiles.to(tl.int64), out_ptr, status_ptr, TILES)


def decode(
    desc: torch.Tensor,
    num_tiles: int,
    out: torch.Tensor,
    status: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Decode the matrix that `desc` describes into `out`; allocates nothing and does not wait for the device.

    Args:
        desc: int64 [4] on the device, made by this process; the payload is read only if its seal is right.
        num_tiles: tiles of the matrix.
        out: BF16, flat, contiguous, at least `num_tiles * 2048` elements, aligned to 16 bytes.
        status: int32 [>= num_tiles]; 0 per tile, or a sum of STATUS_* bits.
        tiles_per_program: 0 for the value in configs.py.
    """
    if num_tiles:
        tiles = tiles_per_program or config_of(out.device).decode_tiles_per_program
        salt = descriptor.salt(desc.data_ptr(), num_tiles)
        _decode_kernel[(triton.cdiv(num_tiles, tiles),)](
            desc, out.view(torch.uint32), status, num_tiles, salt, tiles, num_warps=num_warps(tiles)
        )


def decode_run(
    desc: torch.Tensor,
    num_tiles: int,
    first: int,
    count: int,
    out: torch.Tensor,
    status: torch.Tensor,
    tiles_per_program: int = 0,
) -> None:
    """Decode `count` tiles of the matrix that `desc` describes, from tile `first` on, into the beginning of `out`.

    Args:
        num_tiles: tiles of the whole matrix; first + count is at most that.
        out: BF16, flat, contiguous, at least `count * 2048` elements, aligned to 16 bytes.
        status: int32 [>= count].
        desc, tiles_per_program: as for `decode`, which waits and allocates as little.
    """
    if count:
        tiles = tiles_per_program or config_of(out.device).decode_tiles_per_program
        salt = descriptor.salt(desc.data_ptr(), num_tiles)
        _decode_run_kernel[(triton.cdiv(count, tiles),)](
            desc, out.view(torch.uint32), status, num_tiles, first, count, salt, tiles,
            num_warps=num_warps(tiles),
        )  # fmt: skip
