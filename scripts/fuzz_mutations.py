"""How a fuzz run damages a checkpoint: bytes, tensors and files here; what JSON says in fuzz_mutations_json.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import numpy as np
from fuzz_folder import Folder, Special, Stored, pack, unpack, weight_files

Mutation = Callable[
    [Folder, Random], bool
]  # changes the folder; False where it has nothing to work on
MUTATIONS: dict[str, Mutation] = {}
FIELDS = (
    "encoded_exponent",
    "sign_mantissa",
    "luts",
    "output_positions",
    "gaps",
    "split_positions",
)


def mutation(change: Mutation) -> Mutation:
    MUTATIONS[change.__name__.replace("_", " ")] = change
    return change


def some_file(folder: Folder, rng: Random, ending: str = "") -> tuple[str, bytes] | None:
    """Return name and bytes of a plain file that is not empty."""
    names = [
        n for n, c in folder.items() if n.endswith(ending) and not isinstance(c, Special) and c
    ]
    if not names:
        return None
    name = rng.choice(names)
    content = folder[name]
    return name, content


def some_tensors(folder: Folder, rng: Random) -> tuple[str, list[Stored]] | None:
    """Return the name and the tensors of an intact weight file."""
    names = weight_files(folder)
    if not names:
        return None
    name = rng.choice(names)
    tensors = unpack(folder[name])
    return (name, tensors) if tensors else None


def some_field(folder: Folder, rng: Random, field: str) -> tuple[str, list[Stored], Stored] | None:
    """Return a file, its tensors, and among them one that is this field of a unit."""
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


@mutation
def swap_tensors(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if not found or len(found[1]) < 2:
        return False
    one, two = rng.sample(found[1], 2)
    if rng.random() < 0.5:  # the same field of another unit, perhaps
        alike = [t for t in found[1] if t.name.split(".")[-1] == one.name.split(".")[-1]]
        two = rng.choice(alike)
    one.data, two.data = two.data, one.data
    one.shape, two.shape = two.shape, one.shape
    if rng.random() < 0.5:
        one.dtype, two.dtype = two.dtype, one.dtype
    folder[found[0]] = pack(found[1])
    return one is not two


@mutation
def drop_a_tensor(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if found:
        found[1].remove(rng.choice(found[1]))
        folder[found[0]] = pack(found[1])
    return bool(found)


@mutation
def duplicate_a_tensor(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if not found:
        return False
    name, tensors = found
    tensor = rng.choice(tensors)
    way = rng.randrange(3)
    if way == 0:  # under another name
        other = rng.choice(
            (f"{tensor.name}.weight", f"x.{tensor.name}", tensor.name.replace("0", "1") + "0")
        )
        tensors.append(Stored(other, tensor.dtype, tensor.shape, tensor.data))
        folder[name] = pack(tensors)
    elif way == 1:  # in another file
        folder[rng.choice(("again.safetensors", "model.safetensors", "a.safetensors"))] = pack(
            [tensor]
        )
    else:  # as a plain weight beside its unit
        module = tensor.name.rpartition(".")[0]
        tensors.append(Stored(f"{module}.weight", "BF16", [1, 2], b"abcd"))
        folder[name] = pack(tensors)
    return True


@mutation
def resize_a_tensor(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if not found:
        return False
    tensor = rng.choice(found[1])
    size = max(
        0, len(tensor.data) + rng.choice((-1000, -256, -8, -4, -1, 1, 4, 8, 256, 320, 1000, 4096))
    )
    tensor.data = (tensor.data + rng.choice((b"\0", b"\xff")) * 4096)[:size]
    if tensor.name.endswith(".luts"):
        tensor.data = tensor.data[: size // 256 * 256]
        tensor.shape = [len(tensor.data) // 256, 256]
    else:
        tensor.dtype, tensor.shape = "U8", [size]
    folder[found[0]] = pack(found[1])
    return True


def _set_numbers(folder: Folder, rng: Random, field: str, dtype: str, values: list[int]) -> bool:
    """Change some entries of an integer tensor to hostile ones, or to their neighbours."""
    found = some_field(folder, rng, field)
    if not found or not found[2].data:
        return False
    name, tensors, tensor = found
    numbers = np.frombuffer(tensor.data, dtype).copy()
    limits = np.iinfo(numbers.dtype)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(numbers.size)
        near = int(numbers[rng.randrange(numbers.size)]) + rng.choice((-1, 0, 1, 1000))
        value = rng.choice([*values, near])
        numbers[i] = min(max(value, int(limits.min)), int(limits.max))
    tensor.data = numbers.tobytes()
    folder[name] = pack(tensors)
    return True


@mutation
def lie_about_output_positions(folder: Folder, rng: Random) -> bool:
    return _set_numbers(folder, rng, "output_positions", "<u4", [0, 1, 32768, 32769, (1 << 32) - 1])


@mutation
def lie_about_split_positions(folder: Folder, rng: Random) -> bool:
    return _set_numbers(
        folder, rng, "split_positions", "<i8", [0, -1, 1, 1 << 62, -(1 << 63), (1 << 63) - 1]
    )


@mutation
def lie_about_gaps(folder: Folder, rng: Random) -> bool:
    return _set_numbers(folder, rng, "gaps", "u1", [0, 255, 128, rng.randrange(256)])


@mutation
def lie_in_the_tables(folder: Folder, rng: Random) -> bool:
    found = some_field(folder, rng, "luts")
    if not found or len(found[2].data) < 512 or len(found[2].data) % 256:
        return False
    name, tensors, tensor = found
    rows = np.frombuffer(tensor.data, np.uint8).reshape(-1, 256).copy()
    row = rng.randrange(len(rows))
    way = rng.randrange(7)
    if way == 0:  # pointers: to itself, to the root's place, beyond the end
        rows[row, rng.randrange(256) :] = rng.choice((255, 254, 240, 239, (256 - row) % 256))
    elif way == 1:  # code lengths
        rows[-1, rng.randrange(256)] = rng.choice((0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 64, 255))
    elif way == 2:
        rows[[row, rng.randrange(len(rows))]] = rows[[rng.randrange(len(rows)), row]]
    elif way == 3:
        rows[row] = np.frombuffer(rng.randbytes(256), np.uint8)
    elif way == 4:  # codes that differ from what their runs say, by one slot
        slot = rng.randrange(255)
        rows[0, slot] = rows[0, slot + 1]
    elif way == 5:
        symbols = np.flatnonzero(rows[-1])
        if symbols.size:
            one, two = (int(rng.choice(symbols.tolist())) for _ in range(2))
            rows[-1, [one, two]] = rows[-1, [two, one]]
    else:
        rows[:-1][rows[:-1] == rows[0, rng.randrange(256)]] = rng.randrange(240)
    tensor.data = rows.tobytes()
    folder[name] = pack(tensors)
    return True


@mutation
def lie_in_the_stream(folder: Folder, rng: Random) -> bool:
    found = some_field(folder, rng, "encoded_exponent")
    if not found or not found[2].data:
        return False
    name, tensors, tensor = found
    size = len(tensor.data)
    at = rng.randrange(size)
    tensor.data = rng.choice(
        (
            bytes(size),
            b"\xff" * size,
            rng.randbytes(size),
            tensor.data[at:] + tensor.data[:at],
            tensor.data[:at] + rng.randbytes(size - at),
        )
    )
    folder[name] = pack(tensors)
    return True


@mutation
def put_something_else_in_place_of_a_file(folder: Folder, rng: Random) -> bool:
    if not folder:
        return False
    name = rng.choice(sorted(folder))
    others = [os.fsencode(other) for other in folder if "\0" not in other and other.isprintable()]
    targets = [
        os.fsencode(name),
        b"nowhere",
        b".",
        b"..",
        b"/dev/zero",
        b"/dev/null",
        b"/proc/self/mem",
        b"/",
        *others,
    ]
    folder[name] = rng.choice(
        [Special("pipe"), Special("folder"), b""] + 3 * [Special("link", rng.choice(targets))]
    )
    return True


FILE_NAMES = (
    "a" * 250 + ".safetensors", "\udcff\udcfe.safetensors", "a\nb.safetensors", ".safetensors", "..safetensors",
    "-rf.safetensors", "$(id).safetensors", "\x1b[2J.safetensors", "é\u202e.safetensors", "model.safetensors.tmp",
    "MODEL.SAFETENSORS", "model-00001-of-99999.safetensors", "layer_0.pkl", "pytorch_model.bin",
    "x.safetensors.index.json",
)  # fmt: skip


@mutation
def rename_a_file(folder: Folder, rng: Random) -> bool:
    if not folder:
        return False
    name = rng.choice(sorted(folder))
    folder[rng.choice(FILE_NAMES)] = folder.pop(name)
    return True


@mutation
def copy_or_add_a_file(folder: Folder, rng: Random) -> bool:
    if not folder:
        return False
    content = rng.choice([*folder.values(), b"", b"{}", pack([])])
    folder[rng.choice(FILE_NAMES)] = content
    return True


@mutation
def remove_a_file(folder: Folder, rng: Random) -> bool:
    if folder:
        del folder[rng.choice(sorted(folder))]
        return True
    return False
