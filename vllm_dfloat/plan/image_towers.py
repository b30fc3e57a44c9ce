"""Towers of LLaVA-like models: SigLIP, CLIP or Pixtral, and the projector to the language model."""

from collections.abc import Iterator

from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.plan.build import EVERYWHERE, linear, mlp, norm, plain, two_layers
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.defaults import with_defaults
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.weights import Part, Weight

SIGLIP, CLIP, PIXTRAL = "siglip_vision_model", "clip_vision_model", "pixtral"
SIGLIP_MULTIPLE = 64  # vLLM quantizes a SigLIP MLP only if its sizes are multiples of this
TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"


def vision_of(config: ModelConfig, model_type: str) -> Sizes:
    """Return the vision_config with the defaults that configs of this type leave out."""
    vision = config.whole.part("vision_config")
    if not vision.entries:
        raise FormatError(f"{config.where}: has no vision_config; {config.architecture} has one.")
    return Sizes(vision.where, with_defaults(vision.entries, model_type))


def gemma3_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield SigLIP and Gemma 3's projector, which is not a linear layer."""
    vision = vision_of(config, SIGLIP)
    yield from _encoder(vision, vision.size("num_hidden_layers"), is_clip=False)
    width = vision.size("hidden_size")
    yield from norm(EVERYWHERE, f"{TOWER}.vision_model.post_layernorm", width, bias=True)
    yield plain(EVERYWHERE, f"{PROJECTOR}.mm_input_projection_weight", width, config.hidden)
    yield from norm(EVERYWHERE, f"{PROJECTOR}.mm_soft_emb_norm", width)


def llava_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield the tower up to the layer whose output is used, and a projector of two layers."""
    vision = _tower_kind(config)
    yield from _tower(config, vision)
    yield from _projector(config, vision, "multimodal_projector_bias", True)


def mistral3_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield the tower, the patch merger, which vLLM does not quantize, and the projector."""
    vision = _tower_kind(config)
    width, merged = vision.size("hidden_size"), config.whole.size("spatial_merge_size", 2) ** 2
    yield from _tower(config, vision)
    yield from norm(EVERYWHERE, f"{PROJECTOR}.norm", width)
    yield plain(EVERYWHERE, f"{PROJECTOR}.patch_merger.merging_layer.weight", width, merged * width)
    yield from _projector(config, vision, "multimodal_projector_bias", False)


def _tower_kind(config: ModelConfig) -> Sizes:
    kind = config.whole.part("vision_config").text("model_type")
    if kind not in (SIGLIP, CLIP, PIXTRAL):
        raise UnsupportedError(
            f"{config.where}: vision_config has model_type {shown(kind)}; plan knows {SIGLIP}, {CLIP} and {PIXTRAL} "
            f"with {config.architecture}. Start vLLM to see what fits."
        )
    return vision_of(config, kind)


def _tower(config: ModelConfig, vision: Sizes) -> Iterator[Weight]:
    layers = _layers_looked_at(config, vision)
    if vision.entries["model_type"] == PIXTRAL:
        yield from _pixtral(vision, layers)
    else:
        yield from _encoder(vision, layers, is_clip=vision.entries["model_type"] == CLIP)


def _layers_looked_at(config: ModelConfig, vision: Sizes) -> int:
    """Return how many layers vLLM keeps: up to the deepest one whose output is used."""
    layers = vision.size("num_hidden_layers")
    default = -1 if vision.entries["model_type"] == PIXTRAL else -2
    asked = config.whole.entries.get("vision_feature_layer", default)
    chosen = asked if isinstance(asked, list) else [asked]
    if not chosen or not all(type(i) is int and -layers <= i <= layers for i in chosen):
        raise FormatError(
            f"{config.where}: vision_feature_layer is {shown(asked)}; expected a layer of {layers}, or a list of some."
        )
    deepest: int = max(layers + i + 1 if i < 0 else i for i in chosen)
    return deepest


def _projector(config: ModelConfig, vision: Sizes, entry: str, default: bool) -> Iterator[Weight]:
    sizes = vision.size("hidden_size"), config.hidden, config.hidden
    bias = config.whole.flag(entry, default)
    names = f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"
    yield from two_layers(EVERYWHERE, names, sizes, bias=bias)


def _encoder(vision: Sizes, layers: int, is_clip: bool) -> Iterator[Weight]:
    """Yield a SigLIP or CLIP encoder without its last norm."""
    prefix, width = f"{TOWER}.vision_model", vision.size("hidden_size")
    patch, inner = vision.size("patch_size"), vision.size("intermediate_size")
    patches = (vision.size("image_size") // patch) ** 2
    embeddings = f"{prefix}.embeddings"
    shape = width, vision.size("num_channels"), patch, patch
    yield plain(EVERYWHERE, f"{embeddings}.patch_embedding.weight", *shape)
    if is_clip:
        yield plain(EVERYWHERE, f"{embeddings}.class_embedding", width)
        yield from norm(EVERYWHERE, f"{prefix}.pre_layrnorm", width, bias=True)  # spelt so
    else:
        yield plain(EVERYWHERE, f"{embeddings}.patch_embedding.bias", width)
    positions = patches + is_clip
    yield plain(EVERYWHERE, f"{embeddings}.position_embedding.weight", positions, width)
    is_mlp_compressed = is_clip or not (width % SIGLIP_MULTIPLE or inner % SIGLIP_MULTIPLE)
    heads = Part(width, vision.size("num_attention_heads"), is_repeated=False)
    for layer in range(layers):
        path = f"{prefix}.encoder.layers.{layer}"
        tensors = {"q_proj": width, "k_proj": width, "v_proj": width}
        yield from linear(
            EVERYWHERE, f"{path}.self_attn.qkv_proj", (heads,) * 3, width, "rows", tensors=tensors, bias=True
        )  # fmt: skip
        yield from linear(EVERYWHERE, f"{path}.self_attn.out_proj", Part(width), width, "cols", bias=True)  # fmt: skip
        for name in ("layer_norm1", "layer_norm2"):
            yield from norm(EVERYWHERE, f"{path}.{name}", width, bias=True)
        names = f"{path}.mlp.fc1", f"{path}.mlp.fc2"
        yield from two_layers(EVERYWHERE, names, (width, inner, width), is_compressed=is_mlp_compressed)  # fmt: skip


def _pixtral(vision: Sizes, layers: int) -> Iterator[Weight]:
    width, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    patch = vision.size("patch_size")
    heads = Part(width, vision.size("num_attention_heads"), is_repeated=False)
    shape = width, vision.size("num_channels"), patch, patch
    yield plain(EVERYWHERE, f"{TOWER}.patch_conv.weight", *shape)
    yield from norm(EVERYWHERE, f"{TOWER}.ln_pre", width)
    for layer in range(layers):
        path = f"{TOWER}.transformer.layers.{layer}"
        tensors = {"q_proj": width, "k_proj": width, "v_proj": width}
        yield from linear(
            EVERYWHERE, f"{path}.attention.qkv_proj", (heads,) * 3, width, "rows", tensors=tensors
        )
        yield from linear(EVERYWHERE, f"{path}.attention.o_proj", Part(width), width, "cols")
        yield from mlp(EVERYWHERE, f"{path}.feed_forward", width, inner)
        for name in ("attention_norm", "ffn_norm"):
            yield from norm(EVERYWHERE, f"{path}.{name}", width)
