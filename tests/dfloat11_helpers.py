"""Helpers of the DFloat11 tests: the vectors' originals, and a small encoder of the format.

The encoder is written from the format's description alone. `test_dfloat11_vectors` shows that it makes the
official encoder's bytes, so its other outputs are valid inputs for the decoders.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.dfloat11.coder import Book
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.storage.safetensors_read import read_header

VECTORS = Path(__file__).parent / "data" / "vectors"
MODEL_VECTORS = ("llama-tiny", "llama-tiny-single", "qwen3-tiny-tied", "phi3-tiny-fused")
EOF = -1  # the end marker, ordered before every exponent


def originals() -> dict[str, dict[str, dict[str, Any]]]:
    """Return vector -> tensor -> {"shape", "sha256"} of the BF16 bytes from which the vectors were made."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(
        (VECTORS / "originals.json").read_text()
    )
    return found


def original_shapes(vector: str) -> dict[str, tuple[int, ...]]:
    """Return module path -> shape of every 2-D weight of a vector's original."""
    return {
        name.removesuffix(".weight"): tuple(entry["shape"])
        for name, entry in originals()[vector].items()
        if len(entry["shape"]) == 2
    }


def sha256(bits: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(bits).tobytes()).hexdigest()


@lru_cache(maxsize=1)
def edge_originals() -> dict[str, np.ndarray]:
    """Return unit -> BF16 bits of all its members, for every unit of edge-good."""
    stored = read_header(VECTORS / "edge-good-bf16" / "original.safetensors")
    units = open_checkpoint(VECTORS / "edge-good-df11").units
    return {
        name: np.concatenate(
            [
                stored[f"{name}.{member}.weight" if member else f"{name}.weight"].bits().ravel()
                for member in entry.members or ("",)
            ]
        )
        for name, entry in units.items()
    }


def vector_units(*vectors: str) -> dict[str, Unit]:
    """Return "vector/unit" -> unit for all units of the named vectors."""
    return {
        f"{vector}/{name}": entry.load()
        for vector in vectors
        for name, entry in open_checkpoint(VECTORS / f"{vector}-df11").units.items()
    }


def config(patterns: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return a dfloat11_config."""
    return {
        "version": "0.5.0",
        "threads_per_block": [512],
        "bytes_per_thread": 8,
        "pattern_dict": dict(patterns),
    }


def write_checkpoint(
    path: Path,
    units: Mapping[str, Mapping[str, np.ndarray]],
    patterns: Mapping[str, list[str]] | None = None,
) -> Path:
    """Write units to `path`/model.safetensors with a config.json; return `path`."""
    from safetensors.numpy import save_file  # rented GPU hosts may not have it

    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{field}": array for name, unit in units.items() for field, array in unit.items()
    }
    save_file(tensors, path / "model.safetensors")
    patterns = {name: [] for name in units} if patterns is None else patterns
    (path / "config.json").write_text(json.dumps({"dfloat11_config": config(patterns)}))
    return path


def stored_unit(vector: str, unit: str) -> dict[str, np.ndarray]:
    """Return the six tensors of a unit of a vector, as writable copies."""
    entries = {}
    for file in (VECTORS / f"{vector}-df11").glob("*.safetensors"):
        entries.update(read_header(file))
    prefix = unit + "."
    return {
        name.removeprefix(prefix): tensor.bits().copy()
        for name, tensor in entries.items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }


def encode(bits: np.ndarray, splits: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Return the six tensors of a unit that holds the BF16 words `bits`."""
    bits = bits.ravel().astype(np.uint16)
    exponents = (bits >> 7 & 0xFF).astype(np.int64)
    codes = huffman_codes(exponents)
    length = np.zeros(256, np.int64)
    code = np.zeros(256, np.int64)
    for symbol, (value, size) in codes.items():
        if symbol != EOF:
            length[symbol], code[symbol] = size, value
    sizes = length[exponents]
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    owner = np.repeat(np.arange(bits.size), sizes)
    within = np.arange(total) - (ends - sizes)[owner]
    stream = code[exponents][owner] >> (sizes[owner] - 1 - within) & 1
    starts = ends - sizes
    if total % 8:  # the end marker starts after the last code and fills the byte
        value, size = codes[EOF]
        fill = [value >> (size - 1 - i) & 1 if i < size else 0 for i in range(8 - total % 8)]
        stream = np.append(stream, fill)
        starts = np.append(starts, total)
    packed = np.packbits(stream.astype(np.uint8))
    gaps, positions = _indices(starts, packed.size, bits.size)
    return {
        "encoded_exponent": packed,
        "sign_mantissa": (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8),
        "luts": make_luts(codes),
        "output_positions": positions,
        "gaps": gaps,
        "split_positions": np.array(splits, np.int64),
    }


def _indices(starts: np.ndarray, num_bytes: int, numel: int) -> tuple[np.ndarray, np.ndarray]:
    """Return gaps and output_positions from the bit at which each code starts."""
    blocks = -(-num_bytes // 4096)
    first = np.searchsorted(starts, 64 * np.arange(512 * blocks))  # first code of each window
    inside = first < starts.size
    gap = np.zeros(512 * blocks, np.int64)
    gap[inside] = starts[first[inside]] - 64 * np.flatnonzero(inside)
    gap[gap >= 64] = 0  # no code starts there
    fields = gap[:, None] >> np.arange(4, -1, -1) & 1
    begins = first[::512][inside[::512]]
    positions = np.append(np.minimum(begins, numel), numel).astype("<u4")
    return np.packbits(fields.astype(np.uint8).ravel()), positions.view(np.uint8)


def huffman_codes(exponents: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return symbol -> (code, length) by the official rule; the end marker has weight 1."""
    counts = np.bincount(exponents, minlength=256)
    nodes = [(int(counts[symbol]), int(symbol)) for symbol in np.flatnonzero(counts)]
    heap = [(weight, symbol, symbol) for weight, symbol in [(1, EOF), *nodes]]
    heapq.heapify(heap)
    tree: Any = None
    while len(heap) > 1:
        zero, one = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (zero[0] + one[0], zero[1], (zero[2], one[2])))
    tree = heap[0][2]
    codes: dict[int, tuple[int, int]] = {}
    stack = [(tree, 0, 0)]
    while stack:
        node, value, size = stack.pop()
        if isinstance(node, tuple):
            stack += [(node[0], value * 2, size + 1), (node[1], value * 2 + 1, size + 1)]
        else:
            codes[node] = (value, size)
    return codes


def make_luts(codes: Mapping[int, tuple[int, int]]) -> np.ndarray:
    """Return the tables of a code book; entries without a code copy their left neighbour."""
    by_prefix: dict[tuple[int, int], dict[int, int]] = {(0, 0): {}}
    for symbol, (value, size) in codes.items():
        if symbol == EOF:
            continue
        depth = (size - 1) // 8
        rest = size - 8 * depth
        entries = by_prefix.setdefault((depth, value >> rest), {})
        low = (value & (1 << rest) - 1) << (8 - rest)
        entries.update(dict.fromkeys(range(low, low + (1 << 8 - rest)), symbol))
    order = sorted(by_prefix, key=lambda key: (key[0], key[1] << (32 - 8 * key[0])))
    for row, (depth, prefix) in enumerate(order[1:], 1):
        by_prefix[depth - 1, prefix >> 8][prefix & 0xFF] = 256 - row
    luts = np.zeros((len(order) + 1, 256), np.uint8)
    value = 0
    for row, key in enumerate(order):
        for entry in range(256):
            value = by_prefix[key].get(entry, value)
            luts[row, entry] = value
    for symbol, (_, size) in codes.items():
        if symbol != EOF:
            luts[-1, symbol] = size
    return luts


def long_book() -> Book:
    """Return the code of exponents 100 to 131 with 1 to 32 bits, and of 132 with 32 bits: 0, 10, 110 and so on."""
    lengths, values = np.zeros(256, np.uint8), np.zeros(256, np.uint32)
    for i in range(33):
        lengths[100 + i] = min(i + 1, 32)
        values[100 + i] = ((1 << i) - 1) << 1 if i < 32 else (1 << 32) - 1
    return Book(lengths, values, (0, 1))


def long_code_weights(size: int) -> np.ndarray:
    """Return BF16 bits with the exponents of `long_book`; codes of 32 bits are as frequent as codes of one bit."""
    rng = np.random.default_rng(size)
    symbols = 100 + rng.integers(0, 33, size)
    return (symbols << 7 | rng.integers(0, 1 << 16, size) & 0x807F).astype(np.uint16)
