"""One compressed matrix on its device, and the checks that its bytes have not changed since encoding.

A kernel's status word reports codes that contradict their lengths. A bit flip in a sign, a mantissa or a symbol
contradicts nothing. So the host keeps a checksum of the payload, and the values that the descriptor must hold. They are
compared where a caller waits for a result anyway (`unpack` and the like), never in a forward pass. In a forward pass
every reader compares the seal of the descriptor (descriptor.py) before it uses the descriptor.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self
from weakref import WeakValueDictionary

import torch

from vllm_dfloat.codec import descriptor
from vllm_dfloat.codec.descriptor import DESC_LENGTH as DESC_LENGTH
from vllm_dfloat.codec.descriptor import KIND_PACKED as KIND_PACKED
from vllm_dfloat.codec.descriptor import KIND_RAW as KIND_RAW
from vllm_dfloat.codec.descriptor import Fields
from vllm_dfloat.codec.layout import ALIGNMENT, PackedLayout
from vllm_dfloat.device.checksum import checksum
from vllm_dfloat.errors import FormatError

_DAMAGED = "They were changed after encoding; load the model again."


@dataclass(frozen=True)
class PackedWeight:
    """One packed matrix on its device.

    Attributes:
        payload: uint8, all bytes of the matrix (docs/packed-layout.md).
        desc: int64 [4], see descriptor.py.
        rows, cols: shape of the BF16 matrix.
        name: the tensor's name, for messages.
        fields: kind (0 packed, 1 raw BF16), number of words, longest code; on the host.
        checksum: of the payload at encoding.
        room: uint8, memory of this weight alone that the payload begins; None where that is not known.
        staged: uint8 like `payload`, the memory into which the payload is copied ahead of use. The descriptor tells of
            it, and is that of no payload while other bytes lie there. None: readers follow `payload` itself.
    """

    def __post_init__(self) -> None:
        _weights.setdefault(self.desc.data_ptr(), self)

    payload: torch.Tensor
    desc: torch.Tensor
    rows: int
    cols: int
    name: str
    fields: Fields
    checksum: int
    room: torch.Tensor | None = None
    staged: torch.Tensor | None = None

    @property
    def is_raw(self) -> bool:
        """Whether the matrix is held as BF16, because coding would not have made it smaller."""
        return self.fields[0] == KIND_RAW

    @property
    def num_bytes(self) -> int:
        """Resident bytes, all metadata included."""
        held = self.payload if self.room is None else self.room
        return held.numel() + self.desc.numel() * self.desc.element_size()

    @property
    def size(self) -> int:
        """The size that the seal of the descriptor covers: tiles of the matrix."""
        return PackedLayout(self.rows, self.cols, 0).num_tiles

    @property
    def words(self) -> list[int]:
        """The words that the descriptor must hold."""
        salt = descriptor.salt(self.desc.data_ptr(), self.size)
        read = self.payload if self.staged is None else self.staged
        return descriptor.words(read.data_ptr(), self.fields, salt)

    def described_in(self, desc: torch.Tensor) -> Self:
        """Overwrite `desc`, the descriptor of another weight, with this weight's, and return this weight with `desc`.

        Readers of `desc`, such as a captured CUDA graph, see this weight from now on.
        """
        moved = replace(self, desc=desc)
        desc.copy_(torch.tensor(moved.words, dtype=torch.int64, device="cpu"))
        _weights[desc.data_ptr()] = moved
        return moved

    @cached_property
    def expected_bytes(self) -> int:
        """Bytes of a payload with this shape and these fields."""
        kind, num_words, code_bits = self.fields
        words = 0 if kind == KIND_RAW else num_words
        return PackedLayout(self.rows, self.cols, words, code_bits).num_bytes

    def to(self, device: torch.device | str) -> Self:
        """Return the weight on a device, with its own descriptor.

        A payload already there is not copied, unless it is staged: an update overwrites that in place.
        """
        payload = self.payload.to(device, copy=self.staged is not None)
        desc = make_descriptor(payload, self.fields, self.size, self.name)
        return replace(self, payload=payload, desc=desc, room=None, staged=None)

    def at_rest(self) -> Self:
        """Return the weight for readers out of turn: with a descriptor of the payload itself, if it is staged.

        Raises:
            FormatError: the payload or the descriptor of a staged weight was changed.
        """
        if self.staged is None:
            return self
        self.check_descriptor()
        desc = make_descriptor(self.payload, self.fields, self.size, self.name)
        return replace(self, desc=desc, staged=None)

    def check_descriptor(self) -> None:
        """Check payload and descriptor before a kernel follows the descriptor; waits for the device.

        Raises:
            FormatError: a payload of another dtype, size or alignment, or a changed descriptor.
        """
        where, payload, desc = self.name or "packed tensor", self.payload, self.desc
        if payload.dtype != torch.uint8 or payload.shape != (self.expected_bytes,):
            raise FormatError(
                f"{where}: payload {payload.dtype} {list(payload.shape)}; a matrix [{self.rows}, {self.cols}] "
                f"expects torch.uint8 [{self.expected_bytes}]. {_DAMAGED}"
            )
        _check_alignment(payload, where)
        found, expected = desc.tolist(), self.words
        if self.staged is not None and found == descriptor.NOWHERE:
            found = expected  # not its turn
        if found != expected or desc.dtype != torch.int64 or desc.device != payload.device:
            raise FormatError(
                f"{where}: descriptor {desc.dtype} {found} on {desc.device}; expected torch.int64 {expected} "
                f"on {payload.device}. {_DAMAGED}"
            )

    def check_payload(self) -> None:
        """Check that the payload has not changed since encoding; waits for the device.

        Raises:
            FormatError: the checksum differs.
        """
        found = checksum(self.payload)
        if found != self.checksum:
            raise FormatError(
                f"{self.name or 'packed tensor'}: the {self.payload.numel()} packed bytes have checksum {found}; "
                f"expected {self.checksum}. {_DAMAGED}"
            )


# The weights of this process by the address of their descriptor.
_weights: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


def make_descriptor(
    payload: torch.Tensor, fields: Fields, size: int, name: str = ""
) -> torch.Tensor:
    """Return the descriptor, int64 [DESC_LENGTH], of a payload, on its device.

    Args:
        size: as for `descriptor.salt`.
        name: the tensor's name, for messages.

    Raises:
        FormatError: the payload does not start on a multiple of 16 bytes.
    """
    _check_alignment(payload, name or "packed tensor")
    desc = torch.empty(DESC_LENGTH, dtype=torch.int64, device=payload.device)
    words = descriptor.words(payload.data_ptr(), fields, descriptor.salt(desc.data_ptr(), size))
    desc.copy_(torch.tensor(words, dtype=torch.int64, device="cpu"))
    return desc


def _check_alignment(payload: torch.Tensor, where: str) -> None:
    """Raise FormatError unless a payload starts on a multiple of 16 bytes: the kernels load 16 bytes at once."""
    if payload.data_ptr() % ALIGNMENT:
        raise FormatError(
            f"{where}: payload at {payload.data_ptr():#x} on {payload.device}; expected one that starts on a multiple "
            f"of {ALIGNMENT} bytes. Give make_descriptor a clone() of it."
        )


def follow(desc: torch.Tensor, size: int) -> tuple[int, Fields]:
    """Check a descriptor in CPU memory; return the address of the payload and the fields.

    Every reader on a CPU calls this before it follows a descriptor; the kernels do the same with `_read` of tiles.py.

    Args:
        size: as for `descriptor.salt`.

    Raises:
        FormatError: the descriptor was not made for its address and this size, or its words are not those of the
            weight that has this descriptor.
    """
    found, place = desc.tolist(), desc.data_ptr()
    owner = _weights.get(place)
    if descriptor.is_sound(found, descriptor.salt(place, size)) and (
        owner is None or owner.words == found
    ):
        return found[0], descriptor.fields_of(found)
    owner = owner or _owner(found)
    name = (owner and owner.name) or "packed tensor"
    if owner is not None and owner.staged is not None and found == descriptor.NOWHERE:
        raise FormatError(
            f"{name}: another layer's payload lies where its own was to be copied ahead of use; expected layers that "
            "run in order, each once per pass. Use --cpu-offload-gb in place of --offload-group-size."
        )
    expected = owner.words if owner else "one made in this process, for this place and shape"
    raise FormatError(f"{name}: descriptor {found}; expected {expected}. {_DAMAGED}")


def name_at(place: int) -> str:
    """Return the name of the weight whose descriptor lies at this address; empty if there is none."""
    owner = _weights.get(place)
    return owner.name if owner else ""


def _owner(found: list[int]) -> PackedWeight | None:
    """Return the weight whose payload address or seal a descriptor at an unknown place has; None if there is none."""
    for weight in _weights.values():
        address, *_, seal = weight.words
        if found[0] == address or found[-1] == seal:
            return weight
    return None
