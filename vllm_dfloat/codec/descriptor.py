"""The words of a descriptor, and the seal by which a reader tells that they were made for it.

A descriptor tells a decoder where a payload lies and how large its parts are. It lies in the device's memory, where a
flipped bit, or a write by someone who took it for a weight, would lead the reader anywhere. So its last word is a seal
over all that is relied upon: the other words, the place of the descriptor itself, the size of the matrix as the reader
knows it, and a number that only this process knows. Whoever follows a descriptor compares the seal first, on every
device and in every forward pass (kernels/tiles.py; packed_weight.py for the CPU).

    0  address of the payload
    1  kind: 0 coded, 1 raw BF16, 2 the fast layout
    2  sizes: two numbers of the layout, the first in the lower 32 bits
    3  seal: the sum of the three, each times an odd number, and of the salt, modulo 2**64

A change of one word always changes the sum, since an odd number times less than 2**64 is no multiple of 2**64; so does
a descriptor copied to another place. Bytes that come from elsewhere, another process included, have the right sum with
a probability of 2**-64. (A descriptor that this process once made for the same place and size is not told apart.)
"""

import functools
import secrets

DESC_LENGTH = 4
NOWHERE = [
    0
] * DESC_LENGTH  # in place of a descriptor: no payload lies there now; its seal is wrong
KIND_PACKED, KIND_RAW, KIND_FAST = 0, 1, 2

# Odd, without a pattern, and of 32 bits: on a GPU a product with 64 bits is two instructions then.
ADDRESS_FACTOR, KIND_FACTOR, SIZES_FACTOR = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
ROW_FACTOR = 0x27D4EB2F  # tells the rows of a group's table apart
MAX_MEMBERS, ROW_WORDS = 16, 4  # matrices that such a table lists, and words of a row
PLACE_FACTOR, SIZE_FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93

Fields = tuple[int, int, int]


@functools.cache
def _secret() -> int:
    """Return 64 random bits; made when a process needs them first, so that forked workers do not share them."""
    return secrets.randbits(64)


def signed(value: int) -> int:
    """Return a number modulo 2**64 as an int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def salt(place: int, size: int) -> int:
    """Return what a seal covers beside the words, as an int64.

    Args:
        place: address of the descriptor.
        size: of the matrix: its tiles in the packed layout; in the official one minus the number of its weights; in
            the fast one both its sides.
    """
    return signed(_secret() + place * PLACE_FACTOR + size * SIZE_FACTOR)


def seal(address: int, kind: int, sizes: int, salt: int) -> int:
    """Return the last word of a descriptor."""
    return signed(address * ADDRESS_FACTOR + kind * KIND_FACTOR + sizes * SIZES_FACTOR + salt)


def words(address: int, fields: Fields, salt: int) -> list[int]:
    """Return a descriptor of a payload at `address`; fields: its kind and the two sizes, each below 2**31."""
    kind, first, second = fields
    sizes = first | second << 32
    return [address, kind, sizes, seal(address, kind, sizes, salt)]


def is_sound(found: list[int], salt: int) -> bool:
    """Return whether these are the words of a descriptor made for this place and size by this process."""
    address, kind, sizes, found_seal = found
    return seal(address, kind, sizes, salt) == found_seal


def fields_of(found: list[int]) -> Fields:
    """Return kind and sizes from the words of a sound descriptor."""
    return found[1], found[2] & 0xFFFFFFFF, found[2] >> 32
