"""Shapes of the weights in a unit. The format does not store them: they come from a manifest or a model class."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint import expert_shapes
from vllm_dfloat.checkpoint.folder import CONFIG_KEY, is_dfloat11
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.locate import check_original
from vllm_dfloat.checkpoint.model_class import meta_model
from vllm_dfloat.checkpoint.plain_model import bf16_tensors
from vllm_dfloat.errors import FormatError
from vllm_dfloat.storage.json_file import MAX_CONFIG_BYTES, read_object

Shapes = Mapping[str, tuple[int, ...]]


def model_shapes(model: str | Path | Any, advice: str = "") -> dict[str, tuple[int, ...]]:
    """Return module path -> (out_features, in_features) of every module with a 2-D weight, from the model class.

    Experts that the class holds together count one by one.

    The Hugging Face model is built on the meta device, so nothing of its size is allocated. Code of a checkpoint is
    never run.

    Args:
        model: a directory with config.json, such a file, or a transformers config object.
        advice: what else to do if the config is not enough: a sentence for the end of messages.

    Raises:
        UnsupportedError: transformers does not know the model, or it is not installed.
    """
    made = meta_model(model, advice)
    weights = {name: getattr(module, "weight", None) for name, module in made.named_modules()}
    found = {
        name: (int(weight.shape[0]), int(weight.shape[1]))
        for name, weight in weights.items()
        if weight is not None and getattr(weight, "ndim", 0) == 2
    }
    parameters = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    return {**expert_shapes.of_single_experts(parameters), **found}


def original_shapes(original: Path) -> dict[str, tuple[int, ...]]:
    """Return module path -> shape from the original of a DFloat11 model: from the headers of its files, or its config.

    Args:
        original: a folder with *.safetensors files, a folder with a config.json alone, or such a file.

    Raises:
        FormatError: none of these, damaged, or itself a DFloat11 checkpoint.
        UnsupportedError: there is only a config, and transformers does not know it, or is not installed.
    """
    check_original(original)
    if is_dfloat11(original) if original.is_dir() else CONFIG_KEY in _config(original):
        raise FormatError(
            f"{original}: is a DFloat11 checkpoint, or the config of one; expected the BF16 original, or its "
            "config.json. Give that, or leave out --original where the checkpoint has a manifest or a known config."
        )
    if not original.is_dir() or not weight_files(original):
        return model_shapes(original)
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in bf16_tensors(original).items()
        if len(tensor.shape) > 1
    }


def _config(file: Path) -> Mapping[str, Any]:
    return read_object(file, MAX_CONFIG_BYTES) or {}


def refuse_other_shapes(
    weights: Mapping[str, tuple[int, ...]], shapes: Shapes, source: str, original: Path
) -> None:
    """Refuse an original whose weights have other shapes than the checkpoint's own.

    Args:
        weights: module path -> shape, from the original.
        shapes: those of the checkpoint, as far as it has any.
        source: what has these, for messages.
        original: what was given as the original.

    Raises:
        FormatError: a weight differs.
    """
    for path, shape in weights.items():
        try:
            own = resolve_shape(path, math.prod(shape), shapes, source)
        except FormatError:
            if path in shapes:
                raise
            continue  # the class of today has another name for it
        if own != tuple(shape):
            raise FormatError(
                f"{original}: {path} is {list(shape)}, and {list(own)} in {source}; expected the original of this "
                "checkpoint. Give that one, or leave out --original."
            )


def resolve_shape(path: str, numel: int, shapes: Shapes, where: str) -> tuple[int, ...]:
    """Return the shape of module `path`, which has `numel` weights in the file.

    Checkpoints may use an older prefix than the model class of today (gemma-3:
    `language_model.model.layers.0...`, now `model.language_model.layers.0...`). So if no module has that name,
    it is one with as many weights and the longest equal end of its path.

    Raises:
        FormatError: no module fits, or several fit and differ in shape.
    """
    if path in shapes:
        if math.prod(shapes[path]) != numel:
            raise FormatError(
                f"{where}: {path} has {numel} weights in the file; the model has "
                f"{list(shapes[path])} = {math.prod(shapes[path])}. The weights and "
                "the manifest, original or config.json that gives their shapes belong to different models."
            )
        return tuple(shapes[path])
    index, parts = _by_end(_Same(shapes)), path.split(".")
    ends = [index[end] for start in range(len(parts)) if (end := ".".join(parts[start:])) in index]
    fits = ([name for name in end if math.prod(shapes[name]) == numel] for end in ends)
    best = next(filter(None, fits), [])
    if not best:
        names = dict.fromkeys(name for end in ends for name in end)
        near = [f"{name} {list(shapes[name])}" for name in islice(names, 3)]
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


@dataclass(frozen=True, eq=False)
class _Same:
    """A mapping as the key of a cache: equal to itself alone, and kept alive, so that no other has its id."""

    shapes: Shapes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.shapes is other.shapes

    def __hash__(self) -> int:
        return hash((id(self.shapes), len(self.shapes)))


@lru_cache(maxsize=1)
def _by_end(same: _Same) -> dict[str, list[str]]:
    """Return every end of a module's path, in whole components -> the modules that have it, in their order.

    Comparing each of 50,000 experts with every other would take an hour.
    """
    index: dict[str, list[str]] = defaultdict(list)
    for name in same.shapes:
        parts = name.split(".")
        for start in range(len(parts)):
            index[".".join(parts[start:])].append(name)
    return dict(index)
