"""Mutations of a folder: links, pipes, devices, odd names, missing or additional files."""

from __future__ import annotations

import json
import os
from random import Random

from fuzz.folder import Folder, Special, pack, unpack, weight_files
from fuzz.mutations import mutation


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
    "x.safetensors.index.json", "._model.safetensors", "consolidated.safetensors", "model.safetensors.index.json",
    "consolidated.safetensors.index.json", ".vllm-dfloat-compress.jsonl", "._config.json",
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


@mutation
def move_the_settings_into_a_header(folder: Folder, rng: Random) -> bool:
    """Imitate files for ComfyUI: no config.json, or one without dfloat11_config."""
    config = json.loads(folder["config.json"])
    settings = config.pop("dfloat11_config", None)
    names = weight_files(folder)
    if not settings or not names:
        return False
    texts = [json.dumps(settings), json.dumps(settings)[:-1], "[" * 1000, "{}"]
    for name in rng.sample(names, rng.randint(1, len(names))):
        text = texts[0] if rng.random() < 0.7 else rng.choice([*texts[1:], 5, None])
        metadata = {"dfloat11_config": text, "format": "pt"}
        folder[name] = pack(
            unpack(folder[name]), lambda header, found=metadata: header.update(__metadata__=found)
        )
    if rng.random() < 0.5:
        del folder["config.json"]
    else:
        folder["config.json"] = json.dumps(config).encode()
    return True
