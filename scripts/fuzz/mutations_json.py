"""Mutations of JSON: headers, config.json, patterns, the index and the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.folder import Folder, pack, with_header
from fuzz.mutations import mutation, some_file, some_tensors
from fuzz.values import PATHS, REGEXES, TENSOR_NAMES, absurd


def change_somewhere(content: Any, rng: Random) -> None:
    """Replace, remove or add one value anywhere in an object."""
    at = content
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = absurd(rng)
        return
    if isinstance(at, dict):
        at[rng.choice(TENSOR_NAMES)] = absurd(rng)


def broken_text(text: bytes, rng: Random) -> bytes:
    """Return text that is not JSON, or barely."""
    at = rng.randrange(len(text) + 1)
    deep = rng.choice((b"[", b'{"a":')) * rng.choice((100, 20_000))
    middle = rng.choice(
        (
            b"NaN",
            b"-Infinity",
            b"1e999",
            b"9" * 5000,
            b'"\\ud800"',
            b"\xff\xfe",
            b",",
            b"}",
            b"{",
            deep,
        )
    )
    return rng.choice(
        (
            text[:at] + middle + text[at:], deep + text, text + text, b"\xef\xbb\xbf" + text,
            text[:-1] + b',"a":1,"a":2}',
            text.decode("latin-1").encode("utf-16"), text.decode("latin-1").encode("utf-32"), b"null", b"[]", b'"a"',
            b"", text[:at], text.replace(b":", b": ", 1), text[:-1] + b"}" + b" " * 5000,
            text.replace(b"0", b"NaN", 1),
        )
    )  # fmt: skip


def _edit(
    folder: Folder, rng: Random, ending: str, change: Callable[[dict[str, Any]], Any]
) -> bool:
    """Let `change` edit the object in a JSON file."""
    found = some_file(folder, rng, ending)
    if not found:
        return False
    try:
        content = json.loads(found[1])
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict) or change(content) is False:
        return False
    folder[found[0]] = json.dumps(content).encode()
    return True


@mutation
def lie_in_a_header(folder: Folder, rng: Random) -> bool:
    """Write a wrong shape, dtype, offset or entry of a tensor into a header."""
    found = some_tensors(folder, rng)
    if not found:
        return False
    name, tensors = found

    def change(header: dict[str, Any]) -> None:
        entry = header[rng.choice(list(header))]
        key = rng.choice(("dtype", "shape", "data_offsets"))
        way = rng.randrange(4)
        if way == 0:
            entry[key] = absurd(rng)
        elif way == 1 and key == "dtype":
            entry[key] = rng.choice(("U8", "I8", "BF16", "F64", "F8_E4M3", "BOOL", "bf16", "Q4"))
        elif way == 1 and entry[key]:
            entry[key][rng.randrange(len(entry[key]))] = absurd(rng)
        elif way == 2 and entry["shape"]:
            size = entry["shape"][0]
            entry["shape"] = rng.choice(
                ([size, 1], [1, size], [size] + [1] * 40, [], [0, 1 << 62, 1 << 62], [size + 1])
            )
        else:
            change_somewhere(header, rng)

    folder[name] = pack(tensors, change)
    return True


@mutation
def break_a_header(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng, ".safetensors")
    if not found or len(found[1]) < 10:
        return False
    end = 8 + int.from_bytes(found[1][:8], "little")
    folder[found[0]] = with_header(broken_text(found[1][8:end], rng), found[1][end:])
    return folder[found[0]] != found[1]


@mutation
def rename_a_tensor(folder: Folder, rng: Random) -> bool:
    found = some_tensors(folder, rng)
    if not found:
        return False
    tensor = rng.choice(found[1])
    other = rng.choice(found[1]).name
    tensor.name = rng.choice(
        (rng.choice(TENSOR_NAMES), other, f"{other}.weight", tensor.name + "x")
    )
    folder[found[0]] = pack(found[1])
    return True


@mutation
def break_config(folder: Folder, rng: Random) -> bool:
    text = folder.get("config.json")
    if not isinstance(text, bytes) or not text:
        return False
    folder["config.json"] = broken_text(text, rng)
    return folder["config.json"] != text


@mutation
def lie_in_config(folder: Folder, rng: Random) -> bool:
    def change(config: dict[str, Any]) -> None:
        settings = config.get("dfloat11_config")
        if isinstance(settings, dict) and settings and rng.random() < 0.5:
            settings[rng.choice([*settings, "more"])] = absurd(rng)
        elif rng.random() < 0.3:
            key = rng.choice(
                ("tie_word_embeddings", "text_config", "architectures", "dfloat11_config")
            )
            config[key] = rng.choice((True, {"tie_word_embeddings": True}, absurd(rng)))
        else:
            change_somewhere(config, rng)

    return _edit(folder, rng, "config.json", change)


@mutation
def lie_in_patterns(folder: Folder, rng: Random) -> bool:
    def change(config: dict[str, Any]) -> bool | None:
        patterns = (config.get("dfloat11_config") or {}).get("pattern_dict")
        if not isinstance(patterns, dict) or not patterns:
            return False
        key = rng.choice(list(patterns))
        way = rng.randrange(6)
        if way == 0:
            patterns[rng.choice(REGEXES)] = patterns.pop(key)
        elif way == 1:
            patterns[rng.choice(REGEXES)] = rng.choice((["a"], [], patterns[key]))
        elif way == 2:
            patterns.update({f"{rng.choice(REGEXES)}{i}": [] for i in range(rng.choice((20, 300)))})
        elif way == 3:
            patterns[key] = absurd(rng)
        elif way == 4 and isinstance(patterns[key], list):
            members = patterns[key]
            members.insert(
                rng.randint(0, len(members)), rng.choice((*members, *TENSOR_NAMES, 5, None))
            )
        else:
            patterns[key] = rng.choice((["a"] * 3, ["a", "a.b"], [f"m{i}" for i in range(5000)]))
        return None

    return _edit(folder, rng, "config.json", change)


@mutation
def lie_in_the_manifest(folder: Folder, rng: Random) -> bool:
    def change(manifest: dict[str, Any]) -> bool | None:
        files, tensors = manifest.get("files"), manifest.get("tensors")
        if not isinstance(files, dict) or not isinstance(tensors, dict) or not files or not tensors:
            return False
        name, tensor = rng.choice(list(files)), rng.choice(list(tensors))
        way = rng.randrange(6)
        if way == 0:
            files[rng.choice(PATHS)] = files.pop(name)
        elif way == 1:
            size = rng.choice((absurd(rng), -1, 5))
            files[name] = {"bytes": size, "sha256": rng.choice(("0" * 64, absurd(rng)))}
        elif way == 2:
            tensors[tensor] = rng.choice(
                ([1] * 40, [1, 2, 3], [0], absurd(rng), [1 << 39] * 9, "4x4")
            )
        elif way == 3:
            tensors[rng.choice((tensor.removesuffix(".weight"), *TENSOR_NAMES))] = tensors.pop(
                tensor
            )
        elif way == 4:
            del files[name]
        else:
            change_somewhere(manifest, rng)
        return None

    return _edit(folder, rng, "manifest.json", change)


@mutation
def break_the_manifest_or_index(folder: Folder, rng: Random) -> bool:
    found = some_file(folder, rng, rng.choice(("manifest.json", "index.json")))
    if found:
        folder[found[0]] = broken_text(found[1], rng)
    return bool(found)


@mutation
def lie_in_the_index(folder: Folder, rng: Random) -> bool:
    def change(index: dict[str, Any]) -> bool | None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            return False
        name = rng.choice(list(weight_map))
        way = rng.randrange(5)
        if way == 0:
            weight_map[name] = rng.choice(PATHS)
        elif way == 1:
            weight_map[name] = absurd(rng)
        elif way == 2:
            weight_map[rng.choice(TENSOR_NAMES)] = weight_map.pop(name)
        elif way == 3:
            weight_map[name] = weight_map[rng.choice(list(weight_map))]
        else:
            change_somewhere(index, rng)
        return None

    return _edit(folder, rng, "index.json", change)
