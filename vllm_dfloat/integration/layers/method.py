"""Shared by linear layers and embeddings: a weight that vLLM loads as BF16 and the plugin holds compressed."""

import functools
from collections.abc import Mapping

import torch

from vllm_dfloat.device import ops
from vllm_dfloat.device.scratch import MAIN_SLOT, scratch
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import in_order, layouts, linear_op, room
from vllm_dfloat.integration.layers.layouts import BY_NAME
from vllm_dfloat.integration.layers.placeholder import HOW, WeightPlaceholder
from vllm_dfloat.integration.seam import (
    arrivals,
    compat,
    gemms,
    layer_kinds,
    layerwise,
    places,
    slots,
)
from vllm_dfloat.integration.seam.options import FUSED_EXACT, Options

PACKED = "dfloat11"  # the attribute of a compressed layer: name of a parameter -> its PackedWeight
WEIGHT = "weight"  # the only such parameter of linear layers and embeddings
DESC = "dfloat11_desc"  # its descriptor; not a parameter or buffer, which other code could write
TABLES = "dfloat11_tables"  # of the groups of the layer's block
PROCESSED = "_already_called_process_weights_after_loading"  # vLLM's flag; it deletes it on reload


def weights_of(layer: torch.nn.Module) -> Mapping[str, ops.PackedWeight]:
    """Return the layer's compressed weights by the names of their parameters; empty if it has none."""
    held: Mapping[str, ops.PackedWeight] = layer.__dict__.get(PACKED, {})
    return held


def packed_of(layer: torch.nn.Module) -> ops.PackedWeight | None:
    """Return the compressed `weight` of a linear layer or embedding, or None if the layer has none."""
    return weights_of(layer).get(WEIGHT)


def desc_name(parameter: str) -> str:
    """Return the attribute of a layer that holds the descriptor of a compressed parameter."""
    return DESC if parameter == WEIGHT else f"{DESC}_{parameter}"


def hold(layer: torch.nn.Module, packed: ops.PackedWeight, parameter: str = WEIGHT) -> None:
    """Give a layer a compressed weight; the layer keeps the descriptor tensor of its first one, with new values.

    Compiled graphs, captured CUDA graphs and group tables hold the address of that tensor. The payload goes to host
    memory if vLLM's options for offload say so.
    """
    before = weights_of(layer).get(parameter)
    packed = places.placed(layer, packed, parameter)
    if not places.is_on_host(layer, parameter):
        packed = room.in_room(packed, before)
    desc = layer.__dict__.setdefault(desc_name(parameter), packed.desc)
    if desc is not packed.desc:
        packed = packed.described_in(desc)
    give = functools.partial(_give, layer, parameter)
    give(packed)
    places.settle(layer, packed, parameter, give)


def _give(layer: torch.nn.Module, parameter: str, packed: ops.PackedWeight) -> None:
    layer.__dict__[PACKED] = {**weights_of(layer), parameter: packed}


def refuse_another(
    layer: torch.nn.Module, parameter: str, placeholder: WeightPlaceholder | None, name: str
) -> None:
    """Raise UnsupportedError if a layer's parameter is not its placeholder: it was replaced, or is being updated."""
    found = layer._parameters.get(parameter)
    if found is not placeholder:
        what = "is being updated" if found is not None and found.is_meta else "was replaced"
        raise UnsupportedError(
            f"{name}: its weight {what} from outside, which has no effect on the compressed one; expected "
            f"{placeholder}. Finish the update, or put that back. {HOW}"
        )


class PackedMethod:
    """A mixin for vLLM's quantization methods: `weight` is created on the meta device and packed after loading.

    vLLM materializes the layer when its last weight has arrived, calls process_weights_after_loading and frees the
    BF16 copy before the next layer. After the whole model is loaded, vLLM calls it a second time for every layer.
    """

    uses_meta_device = True
    rows: int
    cols: int

    def __init__(self, name: str, options: Options) -> None:
        compat.let_numba_be_scanned()
        config = compat.current_config()
        self.name = name
        self.asked_layout = options.layout
        self.layout = options.layout  # after loading that in which the weight is held
        self.mode = options.mode
        self.granularity = options.granularity
        self.fused_rows = 0
        self.in_order_rows = 0
        self.placeholder: WeightPlaceholder | None = None
        self.place_in_block: tuple[int, ...] = ()  # what `linear` gets as sizes beside these
        self.group_tables: torch.Tensor | None = None  # a copy on the host
        self.gemm = (
            in_order.BATCH_INVARIANT if gemms.is_batch_invariant() else self._backend(config)
        )
        self.slots = slots.slots(config)
        load_config = getattr(config, "load_config", None)
        self.makes_up_weights = getattr(load_config, "load_format", None) == "dummy"

    def _backend(self, config: object) -> str:
        return gemms.linear_backend(config)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if layer_kinds.is_left_out(layer):
            return
        if getattr(layer, PROCESSED, False):
            self._finish(layer)
            return
        weight = layer.get_parameter("weight").data
        is_update = self.placeholder is not None
        if (is_update or not self.makes_up_weights) and not layerwise.keeps_rest(layer):
            arrivals.check_weight(layer, self.name)
        layerwise.let_go_of_loaded(layer)
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # vLLM sets this for MLA's kv_b_proj
            self.gemm = linear_op.PLAIN
        else:
            linear_op.settle_bias(layer)
        if packed_of(layer) is None:
            self.layout, packed = layouts.pack_first(self.asked_layout, weight, self.name)
        else:
            packed = BY_NAME[self.layout].pack(weight, self.name)
        del weight
        self._replace_weight(layer, packed)

    def _replace_weight(self, layer: torch.nn.Module, packed: ops.PackedWeight) -> None:
        device = layer.get_parameter("weight").device
        del layer.weight
        hold(layer, packed)
        self._put_placeholder(layer, device)
        self._require_scratch(device)

    def _require_scratch(self, device: torch.device) -> None:
        scratch.require(device, BY_NAME[self.layout].scratch_numel(self.rows, self.cols))

    def _put_placeholder(self, layer: torch.nn.Module, device: torch.device) -> None:
        if self.placeholder is None:
            decode = functools.partial(self.dequantize_weight, layer)
            self.placeholder = WeightPlaceholder(self.name, (self.rows, self.cols), device, decode)
        layer.register_parameter("weight", self.placeholder)
        if self.group_tables is not None:  # sleep level 2 discards the tables on the GPU
            layer.__dict__[TABLES].copy_(self.group_tables)
        layer.__dict__[PROCESSED] = True

    def _finish(self, layer: torch.nn.Module) -> None:
        # Now all layers are known. Next vLLM measures the memory left for the KV cache.
        device = layer.get_parameter("weight").device
        self.reserve_scratch(device)
        self.settle_fused_rows(device)
        bias = getattr(layer, "bias", None)
        linear_op.compile_fused(packed_of(layer), self.layout, bias, self.fused_rows)

    def settle_fused_rows(self, device: torch.device) -> None:
        """Set up to how many rows of activations are multiplied without decoding."""
        # PLAIN: vLLM multiplies the identity by the weight, to get the exact weight
        if self.mode == "fused" and self.gemm != linear_op.PLAIN:
            self.fused_rows = linear_op.fused_rows(self.layout, device, self.rows, self.cols)
        if self.asks_for_proof():
            product = in_order.InOrderProduct(
                device, self.rows, self.cols, self.layout, self.gemm, None
            )
            self.in_order_rows = in_order.max_rows(product)

    def asks_for_proof(self) -> bool:
        """Return whether the layer is multiplied without decoding where that is proven to give equal bits."""
        return self.mode == FUSED_EXACT and self.gemm != linear_op.PLAIN

    def reserve_scratch(self, device: torch.device) -> None:
        """Allocate the scratch buffers of all slots for the largest layer or group required so far."""
        scratch.reserve(device, self.slots if device.type == "cuda" else (MAIN_SLOT,))

    def multiply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x @ weight.T + bias."""
        # Cohere's LM head is its embedding, LoRA's wrapper and all.
        layer = getattr(layer, "base_layer", layer)
        self.check_in_place(layer)
        sizes = self.rows, self.cols, self.fused_rows, self.in_order_rows
        tables = getattr(layer, TABLES, None)
        return linear_op.op(
            x,
            layer.dfloat11_desc,
            bias,
            tables,
            [*sizes, *self.place_in_block],
            self.gemm,
            self.layout,
        )

    def check_in_place(self, layer: torch.nn.Module) -> None:
        """Check that the layer's weight is still the placeholder; compiled code does not check.

        Raises:
            UnsupportedError: other code has replaced it, or an update of the layer has begun and not finished.
        """
        if torch.compiler.is_compiling():
            return
        refuse_another(layer, WEIGHT, self.placeholder, self.name)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """Return the decoded BF16 weight [rows, cols], for callers in vLLM that need the values."""
        packed = packed_of(layer)
        if packed is None:
            raise UnsupportedError(f"{self.name}: its weights have not been loaded yet.")
        return BY_NAME[self.layout].unpack(packed.at_rest())
