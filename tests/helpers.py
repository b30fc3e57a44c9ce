"""Bit patterns that the tests of the codec, the kernels and the ops share."""

import numpy as np
import numpy.typing as npt
import torch

Bits = npt.NDArray[np.uint16]


def bf16_bits(values: npt.NDArray[np.floating]) -> Bits:
    """Return BF16 bits of `values`, truncated, not rounded: the exact weights do not matter here."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def gaussian(rows: int, cols: int, seed: int = 0, std: float = 0.02) -> Bits:
    return bf16_bits(np.random.default_rng(seed).standard_normal((rows, cols)) * std)


def unlike(bits: Bits) -> int:
    """Return a 16-bit word that `bits` does not contain, to poison an output with."""
    is_there = np.zeros(1 << 16, dtype=np.bool_)
    is_there[bits] = True  # not sorted: on a GPU host matrices have 500 million weights
    return 0x7FC1 if is_there.all() else int(is_there.argmin())


def to_torch(bits: Bits) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    # As signed words: not every torch has a CUDA kernel for unsigned 16-bit words.
    return a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def poisoned(shape: tuple[int, ...], poison: int, device: torch.device) -> torch.Tensor:
    """Return BF16 in which every element has the bits `poison`."""
    signed = poison - (1 << 16) if poison >> 15 else poison
    return torch.full(shape, signed, dtype=torch.int16, device=device).view(torch.bfloat16)


def assert_within_bound(
    out: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Compare with float64 (products exact, sums nearly exact), within the bound of kernels/packed_matmul.py."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    lost = (weight.shape[1] + 1) * 2**-23 * size
    bound = lost + 2**-8 * (exact.abs() + lost)
    error = (out.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} times the bound"
    # A wrong kernel might keep the bound itself. Ratios, so that no single large result decides the mean.
    assert ((error / bound).nan_to_num(0).mean() <= 0.5).item()


LIMITS = [(10, 8), (40, 9), (120, 10)]  # number of rare symbols -> longest code chosen for them


def rare_symbols(rare: int) -> Bits:
    """Return a matrix [1, n] of a few common exponents and `rare` others that get the longest codes."""
    common = np.random.default_rng(5).geometric(0.5, 60 * 2048)
    symbols = np.concatenate([common, np.repeat(np.arange(100, 100 + rare), 4)])
    np.random.default_rng(6).shuffle(symbols)
    return (symbols << 7 | 0x8001).astype(np.uint16)[None]


def hard_matrices() -> dict[str, Bits]:
    """Return matrices on which a wrong codec of BF16 weights fails first, by name."""
    rng = np.random.default_rng(7)
    special = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F], np.uint16)
    mixed = gaussian(90, 100)
    mixed.reshape(-1)[::97] = special[np.arange(mixed.size // 97 + 1) % special.size]
    skewed = gaussian(64, 96)
    skewed[skewed >> 7 & 0xFF != 120] = 120 << 7
    skewed.reshape(-1)[:50] = np.arange(50, dtype=np.uint16) * 641
    return {
        "all 65,536 patterns": np.arange(1 << 16, dtype=np.uint16).reshape(256, 256),
        "65,536 patterns among gaussians": np.concatenate(
            [gaussian(1, 1 << 18), np.arange(1 << 16, dtype=np.uint16)[None]], axis=1
        ),
        "nan, inf, -0 and denormals": mixed,
        "exponents 240 to 255": (rng.integers(240, 256, (50, 120)) << 7 | 0x8005).astype(np.uint16),
        "one symbol": np.full((70, 130), 0x3C12, np.uint16),
        "zeros": np.zeros((64, 64), np.uint16),
        "two symbols": np.where(rng.random((80, 99)) < 0.01, 0x3F80, 0x3F00).astype(np.uint16),
        "one long code beside short ones": skewed,
        "uniform bits": rng.integers(0, 1 << 16, (64, 65), dtype=np.uint16),
        "1 x 1": gaussian(1, 1),
        "1 x 2047": gaussian(1, 2047),
        "2049 x 1": gaussian(2049, 1),
        "rows of 333": gaussian(37, 333),
        "one tile": gaussian(2, 1024),
        "no rows": np.zeros((0, 5), np.uint16),
        "no columns": np.zeros((5, 0), np.uint16),
    }
