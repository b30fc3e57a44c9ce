"""Compare the files of a checkpoint with its manifest, before another model is made from them.

Weights that differ are an error: the new model would be wrong, and nothing would show it. Config and tokenizer may have
been edited on purpose: they get a line in the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, Manifest, difference
from vllm_dfloat.checkpoint.side_weights import is_weights
from vllm_dfloat.codec.threads import num_threads
from vllm_dfloat.convert.worker_pool import run_in_threads
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.progress import Advance

_MAX_NAMED = 3
_BYTES_WORTH_A_THREAD = 256 << 20


def weight_bytes(manifest: Manifest) -> int:
    """Return the size of all weight files in a manifest."""
    return sum(entry["bytes"] for name, entry in manifest.files.items() if is_weights(name))


def refuse_other_weights(folder: Path, manifest: Manifest, advance: Advance) -> None:
    """Compare size and SHA-256 of every weight file that is listed.

    Args:
        folder: of the checkpoint.
        manifest: of the same.
        advance: called with the bytes that were read.

    Raises:
        FormatError: a file is missing or has other bytes; the message names the first.
    """
    jobs = [
        (folder, name, entry) for name, entry in sorted(manifest.files.items()) if is_weights(name)
    ]
    threads = min(num_threads(), 1 + weight_bytes(manifest) // _BYTES_WORTH_A_THREAD)
    found = [what for what in run_in_threads(_compare, jobs, threads, advance) if what]
    if found:
        more = f" So are {len(found) - 1} other files." if len(found) > 1 else ""
        raise FormatError(
            f"{folder / min(found)}. The file is damaged or of another version.{more} Fetch the checkpoint again, or "
            "make it again: nothing is made of these weights."
        )


def _compare(folder: Path, name: str, entry: Mapping[str, Any], advance: Advance) -> str:
    what = difference(folder / name, entry, advance)
    return f"{name}: {what}" if what else ""


def others(
    folder: Path, manifest: Manifest, copied: Mapping[str, Mapping[str, Any]]
) -> tuple[str, ...]:
    """Return the files beside the weights that differ from the manifest or are missing.

    Args:
        folder: of the checkpoint.
        manifest: of the same.
        copied: file -> size and SHA-256, of those that were copied.
    """
    return tuple(
        name
        for name, entry in sorted(manifest.files.items())
        if not is_weights(name)
        and (difference(folder / name, entry) if name == CONFIG_FILE else copied.get(name) != entry)
    )


def others_line(names: tuple[str, ...]) -> str:
    """Return a sentence about files beside the weights that are not as listed."""
    named = ", ".join(names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{named}{more}: not as {MANIFEST_FILE} says; taken as it is, as if edited on purpose"
