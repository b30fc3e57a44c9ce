"""How the weights of routed experts arrive: through vLLM's loader of the layer, or as whole parameters."""

from types import MethodType
from typing import Any

import torch
from torch.nn import Parameter

from vllm_dfloat.integration.layers.placeholder import WeightPlaceholder
from vllm_dfloat.integration.seam import layer_kinds


class ExpertsParameter(Parameter):
    """A parameter of routed experts before its weights have arrived.

    gpt-oss writes whole parameters with `copy_`, past the weight loader. On the meta device that would be lost without
    an error; here it calls the weight loader.
    """

    weight_loader: Any

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not self.is_meta:
            return super().copy_(source, non_blocking)
        self.weight_loader(self, source)
        return self


def prepare(layer: torch.nn.Module) -> None:
    """Make the layer's parameters take single experts, as in vLLM, and also whole tensors."""
    parameters: list[Any] = [given for given in layer._parameters.values() if given is not None]
    for parameter in parameters:
        parameter.__class__ = ExpertsParameter
        parameter.weight_loader = MethodType(_load, layer)


def settle(layer: torch.nn.Module) -> None:
    """After loading: make the parameters that stay, the biases, plain ones again."""
    given = layer._parameters.values()
    changed: list[Any] = [parameter for parameter in given if type(parameter) is ExpertsParameter]
    for parameter in changed:
        parameter.__class__ = Parameter


def _load(
    layer: Any,
    param: Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str = "",
    shard_id: str | None = None,
    expert_id: int = 0,
    return_success: bool = False,
) -> bool | None:
    """Do what the layer's weight_loader does; without `shard_id`, copy this rank's part of all experts.

    vLLM knows that a method of the layer refers to it, and does not keep the layer alive because of it.
    """
    if shard_id is None:
        param.data.copy_(loaded_weight)
        return True if return_success else None
    return layer.weight_loader(  # type: ignore[no-any-return]
        param, loaded_weight, weight_name, shard_id, expert_id, return_success
    )


_load.supports_moe_loading = True  # type: ignore[attr-defined]  # vLLM asks for it


class ExpertsPlaceholder(WeightPlaceholder):
    """The placeholder of a tensor of experts.

    With expert parallelism vLLM offers every rank all experts, those of other ranks also after its own layer is
    complete. These are passed over, as by vLLM's loader.
    """

    layer: Any

    def weight_loader(self, *args: Any, **kwargs: Any) -> Any:
        expert = kwargs.get("expert_id", args[4] if len(args) > 4 else None)
        if expert is not None and expert not in layer_kinds.local_experts(self.layer()):
            return False if kwargs.get("return_success", len(args) > 5 and args[5]) else None
        return super().weight_loader(*args, **kwargs)
