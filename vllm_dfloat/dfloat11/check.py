"""Decode a unit that was just written, and compare it with the original weights, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_dfloat.dfloat11.coder import Coder
from vllm_dfloat.dfloat11.unit_entry import UnitEntry
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.pieces import StoredWeights
from vllm_dfloat.storage.progress import Advance
from vllm_dfloat.storage.stored_tensor import StoredTensor


def check_unit(
    entry: UnitEntry, originals: Sequence[StoredTensor], coder: Coder, advance: Advance
) -> None:
    """Compare every weight of a unit with its original, bit for bit.

    Args:
        entry: the unit in its file.
        originals: the tensors of its members, in order.
        coder: decodes and compares.
        advance: called with the number of weights that were compared.

    Raises:
        FormatError: a bit differs.
    """
    unit = entry.open()
    at = 0
    for original in originals:
        for piece in StoredWeights(original).pieces():
            if not coder.equals(unit, at, piece):
                raise FormatError(
                    f"{entry.fields['luts'].file}: {original.name}: the bytes just written do not decode to the "
                    f"original bits. {original.file} was written to through a memory map, of which its times say "
                    "nothing, or the memory or the disk of this machine cannot be trusted; the file is not kept."
                )
            at += piece.size
            advance(piece.size)
