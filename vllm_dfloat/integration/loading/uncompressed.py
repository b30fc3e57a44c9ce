"""What of a loaded model is not held compressed: names, with the numbers of blocks left out, and bytes."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from vllm_dfloat.integration.layers.method import weights_of
from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder
from vllm_dfloat.integration.seam import layer_kinds

VECTORS = "vectors (norms and biases)"


def plain_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield (path, parameter, bytes of its memory) of parameters that have values; views of one memory once.

    A placeholder has the size of the BF16 weight, a layer that vLLM leaves out no memory. Latent attention has views.
    On CPUs with AMX vLLM empties the weight of a linear layer and keeps a packed copy of the same size.
    """
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, WeightPlaceholder) or parameter.is_meta:
            continue
        if not parameter.numel() and name.endswith(".weight"):
            layer = model.get_submodule(name.removesuffix(".weight"))
            shape = layer_kinds.shape_of_linear(layer)
            if shape is not None:
                emptied = parameter.new_empty(
                    shape, device="meta"
                )  # routers are float32 in some models
                yield name, emptied, emptied.nbytes
            continue
        storage = parameter.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield name, parameter, storage.nbytes()


def uncompressed(model: torch.nn.Module) -> Mapping[str, int]:
    """Return name -> bytes, the largest first: plain parameters, and weights that coding would not have made smaller.

    A name stands for all transformer blocks: `model.layers.*.mlp.experts.w2_weight`. Vectors have one entry together.
    """
    found: Counter[str] = Counter()
    for name, parameter, num_bytes in plain_parameters(model):
        found[VECTORS if _is_vector(parameter) else _without_numbers(name)] += num_bytes
    held = [weight for layer in model.modules() for weight in weights_of(layer).values()]
    for weight in {id(weight.payload): weight for weight in held if weight.is_raw}.values():
        found[_without_numbers(weight.name)] += weight.payload.nbytes
    return dict(found.most_common())


def _is_vector(parameter: torch.Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) < 2


def _without_numbers(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join("*" if part.isdecimal() else part for part in parts)
