"""What of a loaded model is not held compressed: names, with the numbers of blocks left out, and bytes."""

from collections import Counter, defaultdict
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

    A name stands for all transformer blocks: `model.layers.*.mlp.experts.w2_weight`, for some with their
    number. Vectors have one entry together.
    """
    vectors = 0
    matrices: dict[str, dict[str, int]] = defaultdict(dict)  # name with * -> names -> bytes
    for name, parameter, num_bytes in plain_parameters(model):
        if _is_vector(parameter):
            vectors += num_bytes
        else:
            matrices[_without_numbers(name)][name] = num_bytes
    held = [weight for layer in model.modules() for weight in weights_of(layer).values()]
    for weight in {id(weight.payload): weight for weight in held if weight.is_raw}.values():
        matrices[_without_numbers(weight.name)][weight.name] = weight.payload.nbytes
    num_of = Counter(_without_numbers(name) for name, _ in model.named_parameters())
    found = Counter(
        {
            _of_some(name, list(names), num_of[name]): sum(names.values())
            for name, names in matrices.items()
        }
    )
    found.update({VECTORS: vectors} if vectors else {})
    return dict(found.most_common())


def _of_some(name: str, names: list[str], num: int) -> str:
    """Return what stands for these of the `num` matrices that have the same name but for numbers."""
    if len(names) >= num:
        return name
    return (
        names[0].removesuffix(".weight")
        if len(names) == 1
        else f"{name} ({len(names)} of {num} layers)"
    )


def _is_vector(parameter: torch.Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) < 2


def _without_numbers(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join("*" if part.isdecimal() else part for part in parts)
