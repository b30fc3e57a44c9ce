"""The Hugging Face class of a model, built without memory: what it knows about tensors and the files do not say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.names import first_number
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.storage.json_file import MAX_CONFIG_BYTES, read_object

if TYPE_CHECKING:
    import torch

NO_SHAPES = "the format stores no shapes, so they come from the model's config"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Parts of prefixes that differ between versions of transformers.
_PREFIXES = {"model", "language_model", "vision_model"}


def meta_model(model: str | Path | Any, advice: str = "") -> torch.nn.Module:
    """Return the model on the meta device, so that nothing of its size is allocated. Code of a checkpoint is never run.

    Args:
        model: a directory with config.json, such a file, or a transformers config object.
        advice: what else to do if the config is not enough: a sentence for the end of messages.

    Raises:
        UnsupportedError: transformers is not installed, or does not know the model.
    """
    if not isinstance(model, str | Path):
        return _built(model, "config", advice)
    where = str(Path(model) / CONFIG_FILE) if Path(model).is_dir() else str(model)
    with _transformers(where, advice) as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(str(model), trust_remote_code=False)
        except Exception as error:  # transformers raises whatever the config's keys lead to
            raise UnsupportedError(
                f"{where}: transformers finds no model in it: {_brief(error)}; {NO_SHAPES}. {advice}".strip()
            ) from error
    return _built(config, where, advice)


def _built(config: Any, where: str, advice: str) -> torch.nn.Module:
    reasons = []
    with _transformers(where, advice) as transformers:
        import torch  # here, as transformers: nothing else that reads a checkpoint needs them

        for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"):
            try:
                with torch.device("meta"):
                    factory = getattr(transformers, name)
                    built: torch.nn.Module = factory.from_config(config, trust_remote_code=False)
            except Exception as error:
                reasons.append(f"{name}: {_brief(error)}")
                continue
            return built
    raise UnsupportedError(
        f"{where}: transformers cannot build this model; {NO_SHAPES}. {advice} {' '.join(reasons)}"
    )


@contextmanager
def _transformers(where: str, advice: str) -> Iterator[Any]:
    """Yield the package transformers, or say what is missing: the commands can be installed without it."""
    try:
        import transformers

        yield transformers
    except ImportError as error:
        raise UnsupportedError(
            f"{where}: {NO_SHAPES}, for which torch and transformers are needed: {_brief(error)}. Install them: "
            f"pip install torch transformers. {advice}".strip()
        ) from error


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def refuse_missing_parameters(path: Path, names: Collection[str], described_by: Path) -> str:
    """Refuse a checkpoint that lacks a tensor of its model, if the model's class can be asked.

    Returns:
        Why it could not be asked, "" if it was.

    Args:
        path: its folder.
        names: of all tensors in it.
        described_by: a folder with the config.json of the model, or such a file.

    Raises:
        FormatError: one is missing.
    """
    file = described_by / CONFIG_FILE if described_by.is_dir() else described_by
    if "model_type" not in (read_object(file, MAX_CONFIG_BYTES) or {}):
        return f"{CONFIG_FILE} names no model"
    try:
        missing = missing_parameters(meta_model(described_by), names)
    except UnsupportedError as error:
        if isinstance(error.__cause__, ImportError):
            return "torch and transformers are not installed"
        return "transformers does not know the model"
    if missing:
        raise FormatError(
            f"{path}: {len(missing)} tensors of the model that {file.name} describes are missing, such as "
            f"{missing[0]}; expected all. A weight file is missing, or is of another model: fetch the checkpoint again."
        )
    return ""


def missing_parameters(model: torch.nn.Module, names: Collection[str]) -> list[str]:
    """Return the parameters of a model that are certainly missing from these tensors.

    Checkpoints may use other names than the class of today: other prefixes, or one name per expert. So a parameter of a
    transformer block is missing only if other blocks have it under this name. Any other is missing only if most names
    of the model are the class's own, and no tensor's name has the same end. Of tied parameters one is enough.
    """
    known = {_without_prefix(name) for name in names}
    ends = {_end(name) for name in names}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    absent: list[str] = []
    present: list[str] = []
    for same in tied.values():
        is_there = any(_without_prefix(name) in known for name in same)
        (present if is_there else absent).append(same[0])
    usual = len(present) >= len(absent)
    kinds = {_kind(name) for name in names}
    return [
        name
        for name in absent
        if (_kind(name) in kinds if _NUMBER.search(name) else usual and _end(name) not in ends)
    ]


def _without_prefix(name: str) -> str:
    parts = name.split(".")
    number = first_number(parts)
    end = len(parts) - 2 if number is None else number
    return ".".join([p for p in parts[:end] if p not in _PREFIXES] + parts[max(0, end) :])


def _kind(name: str) -> str:
    return _NUMBER.sub("#", _without_prefix(name))


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])
