"""The table by which one launch finds the matrices of a group (kernels/group_table.py): its rows and their seals."""

import ctypes
from collections.abc import Callable, Sequence

import torch

from vllm_dfloat.codec import descriptor
from vllm_dfloat.codec.descriptor import DESC_LENGTH, MAX_MEMBERS, ROW_WORDS
from vllm_dfloat.device.packed_weight import name_at
from vllm_dfloat.errors import FormatError, UnsupportedError

Rows = list[list[int]]
Shape = tuple[int, int]


def make_table(
    descs: Sequence[torch.Tensor],
    shapes: Sequence[Shape],
    table_rows: Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[Shape]], Rows],
) -> torch.Tensor:
    """Return a table, int64 [members + 1, ROW_WORDS] on the device of the descriptors.

    It holds the addresses of the descriptors. They must stay at these addresses as long as the table is used; their
    content may change. Each row has a seal, as a descriptor has.

    Args:
        table_rows: (table, descs, shapes) -> what it must hold; the seals depend on where it lies.

    Raises:
        UnsupportedError: no members, too many, or an empty one.
    """
    _check_members(descs, shapes)
    shape = len(descs) + 1, ROW_WORDS
    table = torch.empty(shape, dtype=torch.int64, device=descs[0].device)
    rows = table_rows(table, descs, shapes)
    return table.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"))


def _check_members(descs: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> None:
    if not 1 <= len(descs) <= MAX_MEMBERS or not all(rows * cols for rows, cols in shapes):
        raise UnsupportedError(
            f"group of {len(descs)} matrices {list(shapes)[:20]}; expected 1 to {MAX_MEMBERS}, none of them empty. "
            "Decode them one by one."
        )


def check_table(what: str, table: torch.Tensor) -> None:
    """Raise UnsupportedError for a tensor that is no table."""
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != ROW_WORDS:
        raise UnsupportedError(
            f"{what}: table {table.dtype} {list(table.shape)}; expected torch.int64 [members + 1, {ROW_WORDS}]. "
            "Make it with group_table."
        )


def sealed_rows(
    place: int, descs: Sequence[torch.Tensor], starts: Sequence[int], words: Sequence[int]
) -> Rows:
    """Return the rows that a table must hold.

    Args:
        place: address of the table.
        descs: descriptors of the members.
        starts: first tile of each member in the output, then the number of tiles of the group.
        words: what the kernel of the layout wants to know of each member.
    """
    addresses = [desc.data_ptr() for desc in descs]
    rows = zip([*addresses, 0], starts, [*words, 0], strict=True)
    salt = descriptor.salt(place, starts[-1])
    return [
        [address, first, word, _seal(number, address, first, word, salt)]
        for number, (address, first, word) in enumerate(rows)
    ]


def sound_rows(table: torch.Tensor, num_tiles: int) -> Rows:
    """Return the rows of a table in CPU memory.

    Raises:
        FormatError: the seal of a row is wrong.
    """
    rows, salt = table.tolist(), descriptor.salt(table.data_ptr(), num_tiles)
    for number, (address, first, word, seal) in enumerate(rows):
        if _seal(number, address, first, word, salt) != seal:
            names = [name for name in map(name_at, (row[0] for row in rows)) if name]
            raise FormatError(
                f"group of {', '.join(names) or 'matrices'}: row {number} of its table is {rows[number]}; expected one "
                "with the right seal. It was changed after loading; load the model again."
            )
    return rows


def desc_at(address: int) -> torch.Tensor:
    """Return the descriptor in CPU memory that a sound row names, without a copy: its seal covers the address."""
    words = (ctypes.c_int64 * DESC_LENGTH).from_address(address)
    return torch.frombuffer(words, dtype=torch.int64)


def _seal(number: int, address: int, first: int, word: int, salt: int) -> int:
    return descriptor.seal(address, first, word, salt + number * descriptor.ROW_FACTOR)
