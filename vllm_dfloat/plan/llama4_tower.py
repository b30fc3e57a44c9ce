"""The tower of Llama 4, which vLLM gives no quantization method: all of it stays BF16."""

from collections.abc import Iterator

from vllm_dfloat.plan.build import EVERYWHERE, linear, norm, plain, two_layers
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.image_towers import PROJECTOR, vision_of
from vllm_dfloat.plan.weights import Part, Weight

TOWER = "vision_model"


def llama4_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield the tower, its adapter, and the projector to the language model."""
    vision = vision_of(config, "llama4_vision_model")
    width, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    patch, heads = vision.size("patch_size"), vision.size("num_attention_heads")
    patches = (vision.size("image_size") // patch) ** 2 + 1
    yield plain(EVERYWHERE, f"{TOWER}.class_embedding", width)
    yield plain(EVERYWHERE, f"{TOWER}.positional_embedding_vlm", patches, width)
    pixels = vision.size("num_channels") * patch * patch
    yield from linear(
        EVERYWHERE,
        f"{TOWER}.patch_embedding.linear",
        Part(width),
        pixels,
        "rows",
        is_compressed=False,
    )
    for name in ("layernorm_pre", "layernorm_post"):
        yield from norm(EVERYWHERE, f"{TOWER}.{name}", width, bias=True)
    for layer in range(vision.size("num_hidden_layers")):
        yield from _layer(f"{TOWER}.model.layers.{layer}", width, inner, heads)
    first, last = vision.size("projector_input_dim"), vision.size("projector_output_dim")
    names = f"{TOWER}.vision_adapter.mlp.fc1", f"{TOWER}.vision_adapter.mlp.fc2"
    bias = vision.flag("multi_modal_projector_bias")
    yield from two_layers(EVERYWHERE, names, (inner, first, last), bias=bias, is_compressed=False)
    yield from linear(
        EVERYWHERE, f"{PROJECTOR}.linear_1", Part(config.hidden), vision.size("vision_output_dim", last), "rows",
        is_compressed=False,
    )  # fmt: skip


def _layer(prefix: str, width: int, inner: int, heads: int) -> Iterator[Weight]:
    tensors = {"q_proj": width, "k_proj": width, "v_proj": width}
    yield from linear(
        EVERYWHERE, f"{prefix}.self_attn.qkv_proj", (Part(width, heads, is_repeated=False),) * 3, width, "rows",
        tensors=tensors, bias=True, is_compressed=False,
    )  # fmt: skip
    yield from linear(
        EVERYWHERE, f"{prefix}.self_attn.o_proj", Part(width), width, "cols", bias=True, is_compressed=False
    )  # fmt: skip
    names = f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2"
    yield from two_layers(EVERYWHERE, names, (width, inner, width), is_compressed=False)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield from norm(EVERYWHERE, f"{prefix}.{name}", width, bias=True)
