"""One DFloat11 unit as it lies in a file: its six tensors, and all checks that need no decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np

from vllm_dfloat.codec.arrays import I64Array, U8Array
from vllm_dfloat.dfloat11.format import (
    BLOCK_GAP_BYTES,
    FIELDS,
    MAX_BLOCK_WEIGHTS,
    MAX_ROWS,
    MAX_STREAM_BYTES,
    MAX_WEIGHTS,
)
from vllm_dfloat.dfloat11.tables import build_tables
from vllm_dfloat.dfloat11.unit import Unit, num_blocks, whole_positions
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.stored_tensor import StoredTensor

_ADVICE = "The file was changed after encoding, or is of another model than config.json; fetch both again."


class _StoredBytes:
    """The bytes of a tensor in its file: a range is read when it is asked for."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor

    def __len__(self) -> int:
        return self._tensor.num_bytes

    def __getitem__(self, part: slice) -> U8Array:
        begin, end, _ = part.indices(len(self))
        bytes_ = replace(
            self._tensor,
            begin=self._tensor.begin + begin,
            num_bytes=max(0, end - begin),
            shape=(max(0, end - begin),),
        )
        return bytes_.read()


@dataclass(frozen=True)
class UnitEntry:
    """A unit as the headers describe it, sizes checked, contents not yet read.

    Attributes:
        name: module path of the unit.
        members: attribute paths of its weights; empty if the module itself is the weight.
        fields: the six tensors by field name.
        parameters: paths that are tensors themselves, not modules with a `weight` (experts stored as one tensor).
    """

    name: str
    members: tuple[str, ...]
    fields: Mapping[str, StoredTensor]
    parameters: frozenset[str] = frozenset()

    @property
    def num_weights(self) -> int:
        return self.fields["sign_mantissa"].shape[0]

    @property
    def num_bytes(self) -> int:
        """Return what the six tensors take together."""
        return sum(tensor.num_bytes for tensor in self.fields.values())

    @property
    def num_members(self) -> int:
        return self.fields["split_positions"].shape[0] + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Return the tensor name of each weight.

        If the unit has one weight, a list with more names means nothing: the module itself is the weight.
        """
        listed = self.members if self.num_members == len(self.members) else ("",)
        paths = (f"{self.name}.{member}" if member else self.name for member in listed)
        return tuple(path if path in self.parameters else f"{path}.weight" for path in paths)

    @cached_property
    def splits(self) -> I64Array:
        """Return 0, the stored split positions and N.

        Raises:
            FormatError: they do not rise strictly from 0 to N.
        """
        tensor = self.fields["split_positions"]
        splits = np.concatenate(([0], tensor.read(), [self.num_weights])).astype(np.int64)
        if not (splits[1:] > splits[:-1]).all():
            raise FormatError(
                f"{tensor.where}: found {splits[1:-1].tolist()[:20]}; positions that rise "
                f"strictly between 0 and {self.num_weights} are expected. {_ADVICE}"
            )
        return splits

    def load(self) -> Unit:
        """Map the tensors, and check all that needs no decoding.

        Raises:
            FormatError: the contents contradict the format.
        """
        return self._unit(StoredTensor.bits)

    def open(self) -> Unit:
        """Do as `load`, but map nothing: only pieces of the unit can be decoded (`Unit.piece` reads them).

        For long jobs: truncating a mapped file kills the process, and the pages of a mapping count as its memory.
        """
        return self._unit(lambda tensor: cast(U8Array, _StoredBytes(tensor)))

    def _unit(self, large: Callable[[StoredTensor], U8Array]) -> Unit:
        luts = self.fields["luts"]
        table = luts.read()
        first = self.fields["encoded_exponent"]
        return Unit(
            name=self.name,
            where=f"{first.file}: {self.name}",
            stream=large(first),
            sign_mantissa=large(self.fields["sign_mantissa"]),
            gaps=large(self.fields["gaps"]),
            positions=self._positions(),
            splits=self.splits,
            luts=table,
            tables=build_tables(table, luts.where),
        )

    def _positions(self) -> I64Array:
        tensor = self.fields["output_positions"]
        numbers = self.num_weights
        stored = tensor.read().view("<u4").astype(np.int64)
        if stored[0] != 0 or stored[-1] != numbers:
            raise FormatError(
                f"{tensor.where}: runs from {stored[0]} to {stored[-1]}; "
                f"0 to {numbers} is expected, the length of sign_mantissa. {_ADVICE}"
            )
        positions = whole_positions(stored, self.fields["encoded_exponent"].shape[0], numbers)
        counts = np.diff(positions)
        if counts.min() < 0 or counts.max() > MAX_BLOCK_WEIGHTS:
            worst = int(np.argmax((counts < 0) | (counts > MAX_BLOCK_WEIGHTS)))
            raise FormatError(
                f"{tensor.where}: block {worst} has {counts[worst]} weights; "
                f"0 to {MAX_BLOCK_WEIGHTS} are expected. {_ADVICE}"
            )
        return positions


def check_entry(entry: UnitEntry) -> None:
    """Check dtypes and sizes against each other; reads no tensor.

    Raises:
        FormatError: a tensor has a dtype or shape that does not fit the others.
    """
    for field, (dtype, dims) in FIELDS.items():
        tensor = entry.fields[field]
        if tensor.dtype != dtype or len(tensor.shape) != dims:
            raise FormatError(
                f"{tensor.where}: {tensor.dtype} {list(tensor.shape)}; "
                f"{dtype} with {dims} dimension(s) is expected. {_ADVICE}"
            )
    size = {field: entry.fields[field].shape[0] for field in FIELDS}
    stream, weights = size["encoded_exponent"], size["sign_mantissa"]
    blocks = num_blocks(stream)
    rows, width = entry.fields["luts"].shape
    _expect(
        entry, "encoded_exponent", stream, 0 < stream <= MAX_STREAM_BYTES, "1 to 2**31 - 1 bytes"
    )
    fits = 0 < weights <= min(8 * stream, MAX_WEIGHTS)
    _expect(entry, "sign_mantissa", weights, fits, f"1 to {8 * stream} bytes for that stream")
    _expect(entry, "luts", width, width == 256, "rows of 256 entries")
    rows_fit = 2 <= rows <= MAX_ROWS
    _expect(entry, "luts", rows, rows_fit, f"2 to {MAX_ROWS} rows (more cannot be addressed)")
    want = BLOCK_GAP_BYTES * blocks
    _expect(entry, "gaps", size["gaps"], size["gaps"] == want, f"{want} bytes")
    stored = size["output_positions"]
    wants = (4 * blocks, 4 * blocks + 4)
    _expect(entry, "output_positions", stored, stored in wants, f"{wants[1]} (or {wants[0]}) bytes")
    count, listed = entry.num_members, max(1, len(entry.members))
    # One weight and a longer list: the module itself is the weight, and the list is ignored.
    _expect(
        entry,
        "split_positions",
        count - 1,
        count in (1, listed),
        f"{listed - 1} for {listed} weights",
    )


def _expect(entry: UnitEntry, field: str, found: int, good: bool, expected: str) -> None:
    if not good:
        raise FormatError(
            f"{entry.fields[field].where}: found {found}; expected {expected}. {_ADVICE}"
        )
