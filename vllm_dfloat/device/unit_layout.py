"""The official DFloat11 layout of one matrix in memory: where the sections of its payload lie, and how it is made."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_dfloat.codec.arrays import I32Array, I64Array, U8Array, U16Array
from vllm_dfloat.codec.layout import aligned
from vllm_dfloat.device import ops
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit
from vllm_dfloat.dfloat11.format import BLOCK_GAP_BYTES, LENGTH_SHIFT, MAX_CODE_BITS, POINTER
from vllm_dfloat.dfloat11.unit import Unit, num_blocks
from vllm_dfloat.errors import UnsupportedError

KIND_CODED = ops.KIND_PACKED


class UnitWeight(ops.PackedWeight):
    """One matrix in the official layout on its device.

    Attributes:
        payload: uint8, the sections of a `UnitLayout`, or the BF16 bits, padded with zeros to whole tiles.
        fields: kind (0 coded, 1 raw BF16), bytes of the stream, number of tables.
        desc, rows, cols, name, checksum: as in PackedWeight.
    """

    @property
    def size(self) -> int:
        """The size that the seal of the descriptor covers: minus the number of weights; a number of tiles is >= 0."""
        return -self.rows * self.cols

    @cached_property
    def expected_bytes(self) -> int:
        """Bytes of a payload with this shape and these fields."""
        kind, stream_bytes, num_tables = self.fields
        if kind == ops.KIND_RAW:
            return 2 * ops.padded_numel(self.rows, self.cols)
        return UnitLayout(self.rows * self.cols, stream_bytes, num_tables).num_bytes


@dataclass(frozen=True)
class UnitLayout:
    """Byte offsets of the sections of a payload, computed from three numbers."""

    num_weights: int
    stream_bytes: int
    num_tables: int

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.stream_bytes)

    @property
    def positions_offset(self) -> int:
        return 1024 * self.num_tables

    @property
    def gaps_offset(self) -> int:
        return self.positions_offset + aligned(8 * (self.num_blocks + 1))

    @property
    def sign_mantissa_offset(self) -> int:
        return self.gaps_offset + BLOCK_GAP_BYTES * self.num_blocks

    @property
    def stream_offset(self) -> int:
        return self.sign_mantissa_offset + aligned(self.num_weights)

    @property
    def num_bytes(self) -> int:
        return self.stream_offset + self.stream_bytes


@dataclass(frozen=True)
class Sections:
    """Views of a payload in CPU memory, in the order in which decode_blocks takes them."""

    stream: U8Array
    sign_mantissa: U8Array
    gaps: U8Array
    positions: I64Array
    tables: I32Array


def sections_of(payload: U8Array, lay: UnitLayout) -> Sections:
    """Return the sections of a payload with this layout."""
    tables = payload[: lay.positions_offset].view(np.int32).reshape(lay.num_tables, 256)
    positions = payload[lay.positions_offset :][: 8 * (lay.num_blocks + 1)].view(np.int64)
    gaps = payload[lay.gaps_offset : lay.sign_mantissa_offset]
    sign_mantissa = payload[lay.sign_mantissa_offset :][: lay.num_weights]
    return Sections(payload[lay.stream_offset :], sign_mantissa, gaps, positions, tables)


def encoded(bits: U16Array, padded_numel: int, name: str) -> tuple[U8Array, tuple[int, int, int]]:
    """Return the payload and the fields of its descriptor."""
    try:
        unit = as_unit(encode_unit([bits], name or "weight"), name or "weight")
    except UnsupportedError:
        return _raw(bits, padded_numel)
    lay = UnitLayout(bits.size, unit.stream.size, len(unit.tables))
    if lay.num_bytes >= 2 * bits.size:
        return _raw(bits, padded_numel)
    payload = np.zeros(lay.num_bytes, np.uint8)
    _fill(sections_of(payload, lay), unit)
    return payload, (KIND_CODED, lay.stream_bytes, lay.num_tables)


def _fill(sections: Sections, unit: Unit) -> None:
    sections.stream[:] = unit.stream
    sections.sign_mantissa[:] = unit.sign_mantissa
    sections.gaps[:] = unit.gaps
    sections.positions[:] = unit.positions
    sections.tables[:] = unit.tables


def _raw(bits: U16Array, padded_numel: int) -> tuple[U8Array, tuple[int, int, int]]:
    payload = np.zeros(2 * padded_numel, np.uint8)
    payload.view(np.uint16)[: bits.size] = bits
    return payload, (ops.KIND_RAW, 0, 0)


def sound(sections: Sections, num_weights: int) -> Sections:
    """Clamp corrupt positions and tables so decoding stays in bounds."""
    tables, lengths = sections.tables, sections.tables >> LENGTH_SHIFT
    is_code = (tables & POINTER == 0) & (lengths > 0) & (lengths <= MAX_CODE_BITS)
    is_pointer = (tables & POINTER != 0) & (tables & 0xFF < len(tables))
    positions = np.clip(sections.positions, 0, num_weights)
    positions[0] = 0
    positions = np.maximum.accumulate(positions)
    positions[-1] = num_weights
    return dataclasses.replace(
        sections,
        positions=positions,
        tables=np.where(is_code | is_pointer, tables, 0).astype(np.int32),
    )
