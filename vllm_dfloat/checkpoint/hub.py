"""Models of the Hugging Face hub: what an id looks like, the folder of one that was fetched, and why one is not."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from vllm_dfloat.errors import FormatError

# Copies of the model's weights. Other files of these formats may be layers of the model: see side_weights.py.
NOT_FETCHED = [
    "pytorch_model*.bin", "consolidated*.pth", "original/*", "*.gguf", "*.h5", "*.msgpack", "*.ckpt", "*.onnx",
    "*.onnx_data", "optimizer.pt",
]  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADVICE = "give a folder."
# Of the disk, not of the network.
_CANNOT_WRITE = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip


def is_of_hub(model: str) -> bool:
    """Return whether `model` is taken for a hub id: it looks like one, and there is no such file or folder."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def local_folder(model: str, quiet: bool = False) -> Path:
    """Return the folder of a model: the path `model` itself, or a snapshot of the hub's model with that id.

    The snapshot is fetched whole, but for second copies of the weights, or taken from the cache. HF_HUB_CACHE or
    HF_HOME tell the cache, as for all users of huggingface_hub.

    Args:
        model: a path, whatever there is, or a hub id. "./a/b" is a path always.
        quiet: show no progress.

    Raises:
        FormatError: a hub id, and the model cannot be fetched.
    """
    if not is_of_hub(model):
        return Path(model)
    try:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise FormatError(
            f"{model}: no such folder; to fetch a model of that id: pip install huggingface_hub."
        ) from None
    if quiet:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(model, ignore_patterns=NOT_FETCHED))
    except Exception as error:  # network, rights, names, disk: a dozen kinds
        where = f"{model}: no such folder, and the model of that id cannot be fetched"
        if constants.HF_HUB_OFFLINE:
            raise FormatError(
                f"{where}: it is not whole in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids fetching it. "
                f"Unset that, or {_ADVICE}"
            ) from error
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise FormatError(
                f"{where}: {constants.HF_HUB_CACHE} cannot be written ({error.strerror}). Make room or allow writing "
                f"there, set HF_HUB_CACHE to another folder, or {_ADVICE}"
            ) from error
        raise FormatError(
            f"{where}: {why_refused(error, model, constants.ENDPOINT, _ADVICE)}"
        ) from error


def why_refused(error: Exception, model: str, endpoint: str, advice: str) -> str:
    """Return why the hub at `endpoint` gave no model or file, and what to do; `advice` is another way, "give ..."."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"its licence must be accepted first: open {endpoint}/{model}, log in with hf auth login, and run this "
            "again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{endpoint} knows no such model, or keeps it private (then log in with hf auth login). "
            f"Check the name, or {advice}"
        )
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{endpoint} gives none ({type(error).__name__}: {said}). Check the network, or {advice}"
