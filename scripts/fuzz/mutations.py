"""Mutations of a fuzz run: their table, shared helpers, and the mutations of raw bytes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fuzz.folder import Folder, Special, Stored, pack, unpack, weight_files

# Changes the folder; returns False if it does not apply.
Mutation = Callable[[Folder, Random], bool]
MUTATIONS: dict[str, Mutation] = {}


def mutation(change: Mutation) -> Mutation:
    MUTATIONS[change.__name__.replace("_", " ")] = change
    return change


def some_file(folder: Folder, rng: Random, ending: str = "") -> tuple[str, bytes] | None:
    """Return name and bytes of a random plain file that is not empty; None if there is none."""
    names = [
        n for n, c in folder.items() if n.endswith(ending) and not isinstance(c, Special) and c
    ]
    if not names:
        return None
    name = rng.choice(names)
    content = folder[name]
    return name, content


def some_tensors(folder: Folder, rng: Random) -> tuple[str, list[Stored]] | None:
    """Return name and tensors of a random intact weight file; None if there is none."""
    names = weight_files(folder)
    if not names:
        return None
    name = rng.choice(names)
    tensors = unpack(folder[name])
    return (name, tensors) if tensors else None


def some_field(folder: Folder, rng: Random, field: str) -> tuple[str, list[Stored], Stored] | None:
    """Return a file, its tensors, and one of these that is this field of a unit; None if there is none."""
    found = []
    for name in weight_files(folder):
        tensors = unpack(folder[name])
        found += [
            (name, tensors, tensor) for tensor in tensors if tensor.name.endswith("." + field)
        ]
    return rng.choice(found) if found else None


def flipped(data: bytes, rng: Random, most: int = 4) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@mutation
def flip_bits_in_a_tensor(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if not found or not any(tensor.data for tensor in found[1]):
        return False
    tensor = rng.choice([tensor for tensor in found[1] if tensor.data])
    tensor.data = flipped(tensor.data, rng)
    folder[found[0]] = pack(found[1])
    return True


@mutation
def flip_bits_in_a_header(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng, ".safetensors")
    if not found or len(found[1]) < 10:
        return False
    end = min(len(found[1]), 8 + int.from_bytes(found[1][:8], "little"))
    folder[found[0]] = flipped(found[1][:end], rng) + found[1][end:]
    return True


@mutation
def flip_bits_anywhere(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng)
    if found:
        folder[found[0]] = flipped(found[1], rng, 30)
    return bool(found)


@mutation
def overwrite_a_run(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng, ".safetensors")
    if not found:
        return False
    name, content = found
    at = rng.randrange(len(content))
    size = min(len(content) - at, rng.choice((1, 2, 8, 64, 1000)))
    filler = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    folder[name] = content[:at] + filler + content[at + size :]
    return folder[name] != content


@mutation
def truncate(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng)
    if found:
        length = len(found[1])
        folder[found[0]] = found[1][
            : rng.choice((rng.randrange(length), length - 1, min(8, length - 1), 0))
        ]
    return bool(found)


@mutation
def grow(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng)
    if not found:
        return False
    name, content = found
    more = rng.choice((b"\0", b" ", b"\n", rng.randbytes(8), bytes(4096), content))
    folder[name] = rng.choice((content + more, more + content))
    if rng.random() < 0.1:
        folder[name] = Special("sparse", content, rng.choice((1 << 40, len(content) + 1)))
    return True


@mutation
def lie_about_the_header_length(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng, ".safetensors")
    if not found or len(found[1]) < 8:
        return False
    name, content = found
    true = int.from_bytes(content[:8], "little")
    lies = (
        0,
        1,
        2,
        true + 1,
        true - 1,
        len(content),
        len(content) - 8,
        10**8,
        1 << 31,
        1 << 62,
        (1 << 64) - 1,
    )
    folder[name] = max(0, rng.choice(lies)).to_bytes(8, "little") + content[8:]
    return folder[name] != content
