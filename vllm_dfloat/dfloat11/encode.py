"""Encode BF16 weights into the official DFloat11 format: the six tensors of a unit, with the official encoder's bytes.

Three passes, each over the members in bounded pieces: count the exponents, from which the code and the sizes of all
tensors follow; write the codes; take signs and mantissas. A unit of any size is encoded while its file is written: only
its gaps and positions, 1.3 % of the weights' bytes, are held in memory. coder.py works on the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_dfloat.codec.arrays import I64Array, U8Array, U16Array
from vllm_dfloat.codec.layout import SYMBOL_SHIFT
from vllm_dfloat.dfloat11.coder import Coder, CpuCoder, make_book
from vllm_dfloat.dfloat11.encode_stream import StreamEncoder
from vllm_dfloat.dfloat11.format import (
    BLOCK_BITS,
    BLOCK_GAP_BYTES,
    FIRST_POINTER,
    MAX_ROWS,
    MAX_STREAM_BYTES,
    MAX_WEIGHTS,
)
from vllm_dfloat.dfloat11.huffman import Codes, build_codes, build_luts
from vllm_dfloat.dfloat11.tables import build_tables
from vllm_dfloat.dfloat11.unit import Unit, num_blocks, whole_positions
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.storage.pieces import ArrayWeights, Weights
from vllm_dfloat.storage.progress import Advance, ignore

Tensors = dict[str, npt.NDArray[np.generic]]
Pieces = Callable[[], Iterator[npt.NDArray[np.generic]]]

CPU = CpuCoder()


@dataclass(frozen=True, eq=False)
class CountedWeights:
    """A member of a unit whose exponents were counted.

    Attributes:
        weights: where its bits come from.
        counts: how often each exponent occurs, int64 [256].
        last: exponent of its last weight.
    """

    weights: Weights
    counts: I64Array
    last: int


@dataclass(frozen=True, eq=False)
class MeasuredUnit:
    """A unit whose code is known, and with it all sizes.

    Attributes:
        members: its weights in order.
        codes: the code of each exponent and of the end marker.
        luts: uint8 [R, 256].
        num_bits: of all codes together, without the end marker.
        starts_in_last_block: whether a code, or the end marker, starts in the last block.
    """

    members: tuple[Weights, ...]
    codes: Codes
    luts: U8Array
    num_bits: int
    starts_in_last_block: bool

    @property
    def num_weights(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the six tensors."""
        num_bytes = -(-self.num_bits // 8)
        blocks = num_blocks(num_bytes)
        return {
            "encoded_exponent": (num_bytes,),
            "sign_mantissa": (self.num_weights,),
            "luts": self.luts.shape,
            "output_positions": (4 * (blocks + self.starts_in_last_block),),
            "gaps": (BLOCK_GAP_BYTES * blocks,),
            "split_positions": (len(self.members) - 1,),
        }

    @property
    def num_bytes(self) -> int:
        """Return what the six tensors take together."""
        sizes = {field: math.prod(shape) for field, shape in self.shapes.items()}
        return sum(sizes.values()) + 7 * sizes["split_positions"]

    def tensors(
        self, coder: Coder = CPU, encoded: Advance = ignore, split: Advance = ignore
    ) -> dict[str, Pieces]:
        """Return for each tensor a function that gives its pieces; each may be called once.

        The whole stream must be taken before gaps and output positions, which are made with it: so is the order of
        tensors in a file. A piece may be overwritten by the next one.

        Args:
            coder: what works on the pieces.
            encoded: called with the number of weights whose codes were made.
            split: called with the number of weights whose signs and mantissas were taken.
        """
        stream = StreamEncoder(self.members, make_book(self.codes), self.num_bits, coder, encoded)
        positions = self.shapes["output_positions"]

        def signs() -> Iterator[U8Array]:
            for member in self.members:
                for piece in member.pieces():
                    yield coder.sign_mantissa(piece)
                    split(piece.size)

        splits = np.cumsum([member.size for member in self.members])[:-1].astype(np.int64)
        return {
            "encoded_exponent": stream.pieces,
            "sign_mantissa": signs,
            "luts": lambda: iter([self.luts]),
            "output_positions": lambda: iter([stream.positions().view(np.uint8)[: positions[0]]]),
            "gaps": lambda: iter([stream.gaps()]),
            "split_positions": lambda: iter([splits]),
        }


def encode_unit(weights: Sequence[U16Array], name: str, coder: Coder = CPU) -> Tensors:
    """Return the six tensors, as a file holds them, of a unit with these members.

    Args:
        weights: BF16 bits of each member, uint16 of any shape, in the order of the unit.
        name: module path of the unit, for messages.
        coder: what works on the pieces.

    Returns:
        encoded_exponent, sign_mantissa, luts, output_positions, gaps and split_positions.

    Raises:
        UnsupportedError: the format cannot hold these weights.
    """
    for weight in weights:
        if weight.dtype != np.uint16 or not weight.size:
            raise UnsupportedError(
                f"{name}: {weight.dtype}{list(weight.shape)}; expected the bits of BF16 weights, uint16, at least "
                "one. Leave this weight out of compression."
            )
    flat = [np.ascontiguousarray(weight).reshape(-1) for weight in weights]
    unit = measure_unit([count_weights(ArrayWeights(member), coder) for member in flat], name)
    pieces = unit.tensors(coder)
    made: Tensors = {}
    for field, shape in unit.shapes.items():
        made[field] = _joined(pieces[field](), math.prod(shape)).reshape(shape)
    return made


def _joined(pieces: Iterator[npt.NDArray[np.generic]], size: int) -> npt.NDArray[np.generic]:
    """Return the pieces as one flat array of `size` elements."""
    joined: npt.NDArray[np.generic] | None = None
    at = 0
    for piece in pieces:
        flat = piece.reshape(-1)
        if joined is None:
            joined = np.empty(size, flat.dtype)
        joined[at : at + flat.size] = flat
        at += flat.size
    return np.empty(0, np.uint8) if joined is None else joined


def count_weights(
    weights: Weights, coder: Coder = CPU, advance: Advance = ignore
) -> CountedWeights:
    """Count the exponents of a member; `advance` is called with the number of weights that were counted."""
    counts = np.zeros(256, np.int64)
    last = 0
    for piece in weights.pieces():
        counts += coder.count(piece)
        last = int(piece[-1]) >> SYMBOL_SHIFT & 0xFF
        advance(piece.size)
    return CountedWeights(weights, counts, last)


def measure_unit(members: Sequence[CountedWeights], name: str) -> MeasuredUnit:
    """Return the code and the sizes of a unit with these members.

    Raises:
        UnsupportedError: the format cannot hold these weights.
    """
    numel = sum(member.weights.size for member in members)
    if not 0 < numel <= MAX_WEIGHTS:
        raise UnsupportedError(
            f"{name}: {numel} weights; the format holds 1 to {MAX_WEIGHTS} in a unit. Split it, or leave it out."
        )
    counts = np.sum([member.counts for member in members], axis=0)
    _check_exponents(counts, name)
    codes = build_codes(counts)
    luts = build_luts(codes)
    if len(luts) > MAX_ROWS:
        raise UnsupportedError(
            f"{name}: {len(luts) - 2} child tables for {np.count_nonzero(counts)} exponents; the format can name "
            f"{MAX_ROWS - 2}. Leave this weight in BF16."
        )
    num_bits = int(counts @ luts[-1].astype(np.int64))
    num_bytes = -(-num_bits // 8)
    if num_bytes > MAX_STREAM_BYTES:
        raise UnsupportedError(
            f"{name}: {num_bytes} bytes of codes; the format can hold {MAX_STREAM_BYTES}. Split the unit."
        )
    last_start = num_bits - codes[members[-1].last][1]
    starts = num_bits % 8 != 0 or last_start >= BLOCK_BITS * (num_blocks(num_bytes) - 1)
    return MeasuredUnit(tuple(member.weights for member in members), codes, luts, num_bits, starts)


def as_unit(tensors: Mapping[str, npt.NDArray[np.generic]], name: str) -> Unit:
    """Return the unit whose tensors `encode_unit` returned, ready to be decoded."""
    stream = tensors["encoded_exponent"].view(np.uint8)
    sign_mantissa = tensors["sign_mantissa"].view(np.uint8)
    luts = tensors["luts"].view(np.uint8)
    stored = tensors["output_positions"].view("<u4").astype(np.int64)
    splits = np.concatenate(([0], tensors["split_positions"], [sign_mantissa.size]))
    return Unit(
        name=name,
        where=name,
        stream=stream,
        sign_mantissa=sign_mantissa,
        gaps=tensors["gaps"].view(np.uint8),
        positions=whole_positions(stored, stream.size, sign_mantissa.size),
        splits=splits.astype(np.int64),
        luts=luts,
        tables=build_tables(luts, f"{name}.luts"),
    )


def _check_exponents(counts: I64Array, name: str) -> None:
    wrong = np.flatnonzero(counts[FIRST_POINTER:])
    if wrong.size:
        exponent = FIRST_POINTER + int(wrong[0])
        raise UnsupportedError(
            f"{name}: {counts[exponent]} weights have exponent {exponent}; the format holds exponents below "
            f"{FIRST_POINTER} (no value of 2**113 or more, no Inf, no NaN). Leave this weight in BF16."
        )
