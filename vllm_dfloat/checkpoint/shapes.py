"""Shapes of the weights in a unit: the format stores none, so they come from the model's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.manifest import read_manifest
from vllm_dfloat.errors import FormatError, UnsupportedError

Shapes = Mapping[str, tuple[int, ...]]


def module_shapes(model: str | Path | Any) -> dict[str, tuple[int, ...]]:
    """Return module path -> (out_features, in_features) of every module with a 2-D weight.

    A checkpoint made by this package says it in its manifest, also for experts that no module class of today has
    by the names in the file. For any other this builds the Hugging Face model on the meta device, so
    nothing of its size is allocated. Code that comes with a checkpoint is never run.

    Args:
        model: a directory with config.json, or a transformers config object.

    Raises:
        UnsupportedError: transformers does not know the model.
        FormatError: the manifest is damaged.
    """
    manifest = read_manifest(Path(model)) if isinstance(model, str | Path) else None
    if manifest is not None:
        return manifest.module_shapes
    import torch  # imported here: reading a checkpoint needs neither torch nor transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    where = "config"
    if isinstance(model, str | Path):
        where = f"{model}: config.json"
        try:
            model = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
        except ImportError as error:
            raise UnsupportedError(f"transformers cannot be used here: {_brief(error)}") from error
        except Exception as error:  # transformers raises whatever the config's keys lead to
            raise UnsupportedError(
                f"{where}: transformers finds no model in it: {_brief(error)}. Shapes of compressed "
                "weights come from the model's config; pass that of the original model."
            ) from error
    reasons = []
    for factory in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        try:
            with torch.device("meta"):
                built = factory.from_config(model, trust_remote_code=False)
        except Exception as error:
            reasons.append(f"{factory.__name__}: {_brief(error)}")
            continue
        return {
            name: (int(weight.shape[0]), int(weight.shape[1]))
            for name, module in built.named_modules()
            if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
            and weight.dim() == 2
        }
    raise UnsupportedError(
        f"{where}: transformers cannot build this model, which the shapes of compressed weights "
        f"come from. {' '.join(reasons)}"
    )


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def resolve_shape(path: str, numel: int, shapes: Shapes, where: str) -> tuple[int, ...]:
    """Return the shape of module `path`, which has `numel` weights in the file.

    Checkpoints may carry an older prefix than the model class of today (gemma-3:
    `language_model.model.layers.0...`, now `model.language_model.layers.0...`). So without an equal
    name, the modules with the longest equal tail of the path and as many weights are taken.

    Raises:
        FormatError: no module fits, or several fit and differ in shape.
    """
    if path in shapes:
        if math.prod(shapes[path]) != numel:
            raise FormatError(
                f"{where}: {path} has {numel} weights in the file; the model has "
                f"{list(shapes[path])} = {math.prod(shapes[path])}. Checkpoint and config.json "
                "belong to different models."
            )
        return tuple(shapes[path])
    tails = {name: tail for name in shapes if (tail := _equal_tail(path, name))}
    fits = {name: tail for name, tail in tails.items() if math.prod(shapes[name]) == numel}
    best = [name for name in fits if fits[name] == max(fits.values())]
    if not best:
        near = [
            f"{name} {list(shapes[name])}" for name in sorted(tails, key=lambda n: -tails[n])[:3]
        ]
        raise FormatError(
            f"{where}: {path} has {numel} weights in the file, and the model has no module of that "
            f"name and size; nearest: {', '.join(near) or 'none'}."
        )
    if len({tuple(shapes[name]) for name in best}) > 1:
        raise FormatError(
            f"{where}: {path} with {numel} weights could be "
            f"{' or '.join(f'{name} {list(shapes[name])}' for name in sorted(best)[:4])}; "
            "one shape is expected. Name the module as the model does."
        )
    return tuple(shapes[best[0]])


def _equal_tail(left: str, right: str) -> int:
    """Return how many dotted components the two paths have in common at the end."""
    count = 0
    for a, b in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count
