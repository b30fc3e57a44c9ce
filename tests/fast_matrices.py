"""Matrices that the fast layout holds, and on which a wrong encoder or decoder of it fails first."""

import numpy as np
from helpers import Bits, bf16_bits, gaussian

ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> Bits:
    """Return weights of which about 2 % lie outside the best window of 16 exponents."""
    rng = np.random.default_rng(seed)
    return bf16_bits(
        0.02 * rng.standard_normal((rows, cols)) * rng.exponential(size=(rows, cols)) ** 2
    )


def trained_like(rows: int, cols: int, seed: int = 0) -> Bits:
    """Return weights with about 0.04 % escapes, as trained models have: each row has its own scale."""
    rng = np.random.default_rng(seed)
    scale = 0.02 * np.exp(0.5 * rng.standard_normal((rows, 1)))
    return bf16_bits(scale * rng.standard_t(8, (rows, cols)))


def _with_specials() -> Bits:
    mixed = gaussian(300, 520)
    special = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F], np.uint16)
    mixed.reshape(-1)[::97] = special[np.arange(mixed.size // 97 + 1) % special.size]
    mixed[77] = 0
    return mixed


def _with_raw_tiles() -> Bits:
    """Return a matrix with raw tiles, a partial one among them; the last tiles hold a row or a column."""
    weight = gaussian(641, 1025)
    weight[64:128, :128] = 0x7FC1
    weight[576:640, 896:1024] = 0xFF80
    weight[128:256, 256:384] = 0x3C00
    weight[128:132, 256:384] = 0  # as many escapes as are listed
    weight[192:196, 256:384] = 0
    weight[196, 256] = 0  # one more
    weight[640, 1024] = 0x0001
    return weight


def _with_a_raw_edge() -> Bits:
    weight = gaussian(200, 700)
    weight[192:, 640:] = 0  # 480 escapes of a tile of 8 x 60
    weight[128:192, 640:] = 0x8000
    return weight


def _patterns_in_raw_tiles() -> Bits:
    weight = gaussian(640, 1024)
    weight[64:128] = ALL_PATTERNS.reshape(64, 1024)
    return weight


def _patterns_as_escapes() -> Bits:
    weight = gaussian(2048, 1024)
    weight.reshape(-1, 32)[:, 5] = ALL_PATTERNS
    return weight


def fast_matrices() -> dict[str, Bits]:
    return {
        "37 x 333": gaussian(37, 333),
        "100 x 328": gaussian(100, 328),
        "70 x 336": gaussian(70, 336),
        "whole tiles": gaussian(128, 1024),
        "one row": gaussian(1, 4096),
        "heavy tails": heavy_tailed(200, 384),
        "specials and a zero row": _with_specials(),
        "raw tiles": _with_raw_tiles(),
        "a raw tile at the edge": _with_a_raw_edge(),
        "all patterns in raw tiles": _patterns_in_raw_tiles(),
        "the lowest base": gaussian(64, 128, std=1e-40),
        "the highest base": np.full((64, 128), 0x7F80, np.uint16),
    }


def large_fast_matrices() -> dict[str, Bits]:
    return {"all patterns as escapes": _patterns_as_escapes()}
