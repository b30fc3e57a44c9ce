"""Compressed routed experts: the two tensors w13 and w2 of a mixture's layer, as vLLM's BF16 kernel wants them.

vLLM's own method loads, pads, shuffles and chooses the kernel. What it then holds is packed as it lies, so decoding
gives what the kernel reads, whatever its form. Biases and all other parameters stay as they are.
"""

import dataclasses
import functools
import weakref
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm_dfloat.device import ops
from vllm_dfloat.device.scratch import MAIN_SLOT, scratch
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import (
    experts_apply,
    experts_kernel,
    experts_loading,
    layouts,
    method,
)
from vllm_dfloat.integration.layers.experts_kernel import HeldExperts, Tensor3
from vllm_dfloat.integration.layers.experts_loading import ExpertsPlaceholder
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.seam import (
    arrivals,
    compat,
    expert_kernels,
    expert_products,
    layerwise,
    slots,
)
from vllm_dfloat.integration.seam.options import Options

# vLLM's compile cache hashes this file's text, but not that of the op: increase this when the op's meaning changes.
OP_REVISION = 1

W13, W2 = "w13_weight", "w2_weight"


class DFloat11ExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vLLM is untyped
    """vLLM's method for BF16 experts, on weights that are created on the meta device and packed after loading.

    Attributes:
        name: of the layer, in messages.
        backend: the name of vLLM's kernel.
        mode: that of the options.
        why_all: why experts without tokens are decoded too, "" if they are not.
        why_decoded: why experts are decoded whatever the number of tokens in a mode other than "exact"; "" if they
            need not be.
        most_tokens: up to how many tokens w13 and w2 may be multiplied without decoding; known after loading.
    """

    uses_meta_device = True
    supports_eplb = False
    experts_cls: Any
    fused_rows = 0

    def __init__(self, moe_config: Any, name: str, options: Options) -> None:
        super().__init__(moe_config)
        compat.let_numba_be_scanned()
        config = compat.current_config()
        self.supports_pre_processed_weights = False
        self.name = name
        self.asked_layout = self.layout = options.layout
        self.backend = expert_kernels.backend_of_experts(self)
        self.why_all = self._why_all()
        self.mode = options.mode
        self.why_decoded = self._why_decoded()
        self.most_tokens = 0, 0
        self.placeholders: dict[str, ExpertsPlaceholder] = {}
        self.slots = slots.main_slots(config)
        self.all_slots = slots.slots(config)
        self.is_traced = expert_kernels.traces_experts(config)
        load_config = getattr(config, "load_config", None)
        self.makes_up_weights = getattr(load_config, "load_format", None) == "dummy"
        if self.experts_cls is not None:  # some platforms have no kernel of this kind
            self.experts_cls = experts_apply.decoding(self.experts_cls)
        if self.can_compress and expert_kernels.moves_experts(moe_config):
            raise UnsupportedError(
                f"{name}: --enable-eplb moves experts between ranks while serving; expected experts that stay, since "
                'these are held compressed. Remove it, or name the experts in `ignore`, such as "re:.*experts".'
            )

    def _why_all(self) -> str:
        """Return why experts without tokens are decoded too, "" if they are not."""
        if BY_NAME[self.layout].decode_chosen is None:
            return f"in the layout {self.layout} no part of a matrix is decoded alone"
        if expert_kernels.routes_by_itself(self):
            return f"vLLM's kernel {self.backend} chooses them itself"
        if self.backend not in expert_kernels.READ_CHOSEN_EXPERTS_ONLY:
            return f"vLLM's kernel {self.backend} may read them"
        return ""

    def _why_decoded(self) -> str:
        """Return why experts are decoded whatever the number of tokens, "" if they need not be, or in mode "exact"."""
        if self.mode == "exact":
            return ""
        if BY_NAME[self.layout].experts_product is None:
            return f"the layout {self.layout} has no other way"
        if self.backend != expert_products.BACKEND:
            return f"vLLM's kernel {self.backend} reads BF16"
        if expert_products.product_of(self.experts_cls) is None:
            return "this vLLM's kernel is made of other parts"
        return ""

    @property
    def decoded_line(self) -> str:
        """What the log says of `why_decoded`; "" if there is nothing to say."""
        if not self.why_decoded:
            return ""
        return f"experts are decoded first in mode {self.mode!r} too ({self.why_decoded})"

    @property
    def can_compress(self) -> bool:
        """Whether vLLM's kernel takes weights that are decoded for it; if not, the experts stay BF16."""
        return expert_kernels.can_compress_experts(self.backend)

    @property
    def decodes_all(self) -> bool:
        """Whether experts without tokens are decoded too."""
        return bool(self.why_all)

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().create_weights(layer, *args, **kwargs)
        experts_loading.prepare(layer)
        compat.process_when_complete(layer)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, method.PROCESSED, False):
            self._finish(layer)
            return
        if (self.placeholders or not self.makes_up_weights) and not layerwise.keeps_rest(layer):
            arrivals.check_experts(layer, self.name)
        layerwise.let_go_of_loaded(layer)
        expert_kernels.renew_cpu_kernel(layer)
        super().process_weights_after_loading(layer)
        layerwise.keep_in_place(layer, ("w13_bias", "w2_bias"))
        packed: dict[str, ops.PackedWeight] = {}
        if not self.placeholders:  # later values keep the layout, which compiled graphs name
            matrices = {f"{self.name}.{name}": _matrix(layer, name) for name in (W13, W2)}
            self.layout, packed = layouts.pack_first_of_all(self.asked_layout, matrices)
            del matrices
        w13, w2 = self._pack(layer, W13, packed), self._pack(layer, W2, packed)
        experts_loading.settle(layer)
        check = experts_kernel.checked(layer, self.check_in_place)
        held = HeldExperts(
            w13, w2, self.layout, self.decodes_all, check, self.mode, self.most_tokens
        )
        self._give(held)
        layer.__dict__[method.PROCESSED] = True

    def _pack(
        self, layer: torch.nn.Module, name: str, packed: dict[str, ops.PackedWeight]
    ) -> Tensor3:
        """Put a compressed tensor in the place of a BF16 one; packed: by full name, those that are compressed."""
        parameter, full_name = layer.get_parameter(name), f"{self.name}.{name}"
        shape, device = tuple(parameter.shape), parameter.device
        held = packed.pop(full_name, None)
        if held is None:
            held = BY_NAME[self.layout].pack(_matrix(layer, name), full_name)
        method.hold(layer, held, name)
        delattr(layer, name)
        del held
        # Other code may keep the parameter for a while.
        parameter.data = parameter.data.new_empty(0)
        if name not in self.placeholders:
            decode = functools.partial(self._unpack, weakref.ref(layer), name)
            placeholder = ExpertsPlaceholder(full_name, shape, device, decode)
            placeholder.layer = weakref.ref(layer)
            self.placeholders[name] = placeholder
        layer.register_parameter(name, self.placeholders[name])
        return Tensor3(layer.__dict__[method.desc_name(name)], shape)

    def _give(self, held: HeldExperts) -> None:
        kernel = expert_kernels.experts_of_kernel(self)
        setattr(kernel, experts_kernel.HELD, held)
        if not (self.is_traced and held.w13.desc.device.type == "cpu"):
            device = held.w13.desc.device
            scratch.require(device, held.scratch_numel, self.slots)

    def _finish(self, layer: torch.nn.Module) -> None:
        # Now all layers are known. Next vLLM measures the memory left for the KV cache.
        device = layer.get_parameter(W13).device
        scratch.reserve(device, self.all_slots if device.type == "cuda" else (MAIN_SLOT,))

    @property
    def held(self) -> HeldExperts:
        """What the kernel knows of the loaded layer's experts."""
        held: HeldExperts = getattr(expert_kernels.experts_of_kernel(self), experts_kernel.HELD)
        return held

    def settle_most_tokens(self, layer: torch.nn.Module) -> bool:
        """Set up to how many tokens may be multiplied without decoding; return whether there are any.

        Which of their products are, is known later (proven_experts.py). Without any, `why_decoded` says why.
        """
        if self.mode == "exact" or self.why_decoded or not method.weights_of(layer):
            return False
        of = BY_NAME[self.layout].experts_product
        if of is None:  # the layout of the options would not make the first layer small enough
            self.why_decoded = f"the layout {self.layout} has no other way"
            return False
        num_experts, per_token, _ = expert_products.sizes_of(self.moe)
        device, held = layer.get_parameter(W13).device, self.held
        most = [
            of.max_tokens(device, num_experts, per_token, *tensor.sizes[1:])
            for tensor in (held.w13, held.w2)
        ]
        self.most_tokens = most[0], most[1]
        self._give(dataclasses.replace(held, most_tokens=self.most_tokens))
        if not any(most):
            shapes = " and ".join(str(list(tensor.sizes[1:])) for tensor in (held.w13, held.w2))
            self.why_decoded = f"there is no product for experts {shapes} on {device}"
        return any(most)

    def check_in_place(self, layer: torch.nn.Module) -> None:
        """Raise UnsupportedError if other code has replaced the layer's weights, or an update has not finished."""
        for name in (W13, W2):
            placeholder = self.placeholders.get(name)
            method.refuse_another(layer, name, placeholder, f"{self.name}.{name}")

    def dequantize_weight(self, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return decoded w13 and w2, in the form of vLLM's kernel."""
        return self._unpack(lambda: layer, W13), self._unpack(lambda: layer, W2)

    def _unpack(self, layer: Any, name: str) -> torch.Tensor:
        packed: ops.PackedWeight | None = method.weights_of(layer()).get(name)
        if packed is None:
            raise UnsupportedError(f"{self.name}.{name}: its weights have not been loaded yet.")
        return BY_NAME[self.layout].unpack(packed.at_rest()).view(self.placeholders[name].shape)


def _matrix(layer: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a BF16 tensor of experts as one matrix, all rows of its experts one after the other."""
    data = layer.get_parameter(name).data
    return data.view(-1, data.shape[-1])
