"""Mutations of the bytes, sizes and places of tensors; the files stay valid safetensors files."""

from __future__ import annotations

from random import Random

import numpy as np
from fuzz.folder import Folder, Stored, pack
from fuzz.mutations import mutation, some_field, some_tensors


@mutation
def swap_tensors(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if not found or len(found[1]) < 2:
        return False
    one, two = rng.sample(found[1], 2)
    if rng.random() < 0.5:  # often the same field of another unit
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
    else:  # as a plain weight in addition to its unit
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
    """Change some entries of an integer tensor to extreme values, or by one."""
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
    if way == 0:  # pointers: to itself, to the root, past the end
        rows[row, rng.randrange(256) :] = rng.choice((255, 254, 240, 239, (256 - row) % 256))
    elif way == 1:  # code lengths
        rows[-1, rng.randrange(256)] = rng.choice((0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 64, 255))
    elif way == 2:
        rows[[row, rng.randrange(len(rows))]] = rows[[rng.randrange(len(rows)), row]]
    elif way == 3:
        rows[row] = np.frombuffer(rng.randbytes(256), np.uint8)
    elif way == 4:  # codes that differ by one table entry from those of their runs
        entry = rng.randrange(255)
        rows[0, entry] = rows[0, entry + 1]
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
