"""How a fuzz run damages a folder: links, pipes, devices, odd names, files too many or too few."""

from __future__ import annotations

import os
from random import Random

from fuzz_folder import Folder, Special, pack
from fuzz_mutations import mutation


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
