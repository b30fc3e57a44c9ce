"""What a checkpoint gives to vLLM's weight loaders: (name, tensor) pairs, in an order that they can count."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.integration.seam import compat
from vllm_dfloat.integration.updating.rehearsal import StoredWeights
from vllm_dfloat.storage.read_ahead import read_ahead
from vllm_dfloat.storage.safetensors_read import read_header
from vllm_dfloat.storage.stored_tensor import StoredTensor

Weights = Iterator[tuple[str, torch.Tensor]]


def official_weights(folder: Path, hf_config: Any, model: torch.nn.Module) -> Weights:
    """Return the weights of an official checkpoint; each is decoded while vLLM copies it, on the model's device.

    Shapes come from the manifest; without one, from the model that config.json describes, or else from `hf_config`.
    """
    from vllm_dfloat.checkpoint.members import plan, shapes_of, spans
    from vllm_dfloat.checkpoint.reader import open_checkpoint
    from vllm_dfloat.checkpoint.weights import planned_weights
    from vllm_dfloat.device.ops import uses_triton
    from vllm_dfloat.device.unit_decode import decode_unit

    checkpoint = open_checkpoint(folder)
    described_by = folder if "model_type" in checkpoint.config else hf_config
    items = plan(checkpoint, shapes_of(checkpoint, described_by))
    device = compat.model_device()
    on_device = lambda unit, *weights: decode_unit(unit, device, *weights)  # noqa: E731
    decode = on_device if uses_triton(device) else None
    pairs = planned_weights(checkpoint, items, decode)
    return StoredWeights(
        read_ahead(pairs, wanted(spans(items), model)),
        str(folder),
        [(item.name, item.shape) for item in items],
    )


def wanted(tensors: Iterable[StoredTensor], model: torch.nn.Module) -> list[StoredTensor]:
    """Return the tensors except those of layers on other pipeline stages."""
    return [tensor for tensor in tensors if not compat.is_elsewhere(tensor.name, model)]


def stored_in(files: Sequence[Path]) -> list[StoredTensor]:
    """Return the tensors of safetensors files in the order in which vLLM reads them; none if a header is refused."""
    try:
        return [tensor for file in files for tensor in read_header(file).values()]
    except DFloatError:
        return []  # vLLM reports the error, or supports a dtype that we do not


def biases_after_weights(pairs: Iterable[tuple[str, torch.Tensor]]) -> Weights:
    """Yield the same pairs, each bias after the weight of its layer.

    vLLM counts a layer's elements from its weight on. It would not count a bias that comes before, and the layer would
    stay uncompressed until the end of the checkpoint.
    """
    waiting: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    for name, tensor in pairs:
        layer, _, kind = name.rpartition(".")
        if kind == "bias" and layer not in seen:
            waiting[layer] = tensor
            continue
        yield name, tensor
        if kind == "weight":
            seen.add(layer)
            if layer in waiting:
                yield f"{layer}.bias", waiting.pop(layer)
    yield from ((f"{layer}.bias", tensor) for layer, tensor in waiting.items())
