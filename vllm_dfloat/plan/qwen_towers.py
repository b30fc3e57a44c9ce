"""Towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with their patch mergers."""

from collections.abc import Iterator

from vllm_dfloat.plan.build import EVERYWHERE, linear, mlp, norm, plain, two_layers
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.image_towers import vision_of
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.weights import Part, Weight


def qwen2_vl_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield Qwen2-VL's tower; vLLM cuts its qkv by rows, not by heads."""
    vision = vision_of(config, "qwen2_vl")
    width = vision.size("embed_dim")
    inner = int(width * vision.ratio("mlp_ratio", 4))
    yield from _patches(vision, width)
    for prefix in _layers(vision):
        yield from _attention(prefix, width, (Part(3 * width),))
        names = f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2"
        yield from two_layers(EVERYWHERE, names, (width, inner, width))
        for name in ("norm1", "norm2"):
            yield from norm(EVERYWHERE, f"{prefix}.{name}", width, bias=True)
    yield from norm(EVERYWHERE, "visual.merger.ln_q", width, bias=True)
    yield from _merger(vision, width, config.hidden, "visual.merger.mlp.0", "visual.merger.mlp.2")


def qwen2_5_vl_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield Qwen2.5-VL's tower: RMS norms, and gated MLPs with biases."""
    vision = vision_of(config, "qwen2_5_vl")
    width = vision.size("hidden_size")
    yield from _patches(vision, width)
    for prefix in _layers(vision):
        yield from _attention(prefix, width, _heads(vision, width))
        yield from mlp(
            EVERYWHERE, f"{prefix}.mlp", width, vision.size("intermediate_size"), bias=True
        )
        for name in ("norm1", "norm2"):
            yield from norm(EVERYWHERE, f"{prefix}.{name}", width)
    yield from norm(EVERYWHERE, "visual.merger.ln_q", width)
    out = vision.size("out_hidden_size", config.hidden)
    yield from _merger(vision, width, out, "visual.merger.mlp.0", "visual.merger.mlp.2")


def qwen3_vl_tower(config: ModelConfig) -> Iterator[Weight]:
    """Yield Qwen3-VL's tower, with a merger for each layer whose output the language model uses."""
    vision = vision_of(config, "qwen3_vl")
    width, out = vision.size("hidden_size"), vision.size("out_hidden_size", config.hidden)
    yield from _patches(vision, width)
    yield plain(EVERYWHERE, "visual.patch_embed.proj.bias", width)
    yield plain(
        EVERYWHERE, "visual.pos_embed.weight", vision.size("num_position_embeddings"), width
    )
    sizes = width, vision.size("intermediate_size"), width
    for prefix in _layers(vision):
        yield from _attention(prefix, width, _heads(vision, width))
        names = f"{prefix}.mlp.linear_fc1", f"{prefix}.mlp.linear_fc2"
        yield from two_layers(EVERYWHERE, names, sizes)
        for name in ("norm1", "norm2"):
            yield from norm(EVERYWHERE, f"{prefix}.{name}", width, bias=True)
    merged = vision.size("spatial_merge_size", 2) ** 2 * width
    mergers = {"visual.merger": width}
    mergers |= {f"visual.deepstack_merger_list.{i}": merged for i in range(_looked_into(vision))}
    for name, normed in mergers.items():
        yield from norm(EVERYWHERE, f"{name}.norm", normed, bias=True)
        yield from _merger(vision, width, out, f"{name}.linear_fc1", f"{name}.linear_fc2")


def _looked_into(vision: Sizes) -> int:
    return len(vision.integers("deepstack_visual_indexes", (8, 16, 24)))


def _patches(vision: Sizes, width: int) -> Iterator[Weight]:
    patch, frames = vision.size("patch_size"), vision.size("temporal_patch_size", 2)
    shape = width, vision.size("in_channels"), frames, patch, patch
    yield plain(EVERYWHERE, "visual.patch_embed.proj.weight", *shape)


def _layers(vision: Sizes) -> list[str]:
    return [f"visual.blocks.{i}" for i in range(vision.size("depth"))]


def _heads(vision: Sizes, width: int) -> tuple[Part, ...]:
    """Return queries, keys and values."""
    return (Part(width, vision.size("num_heads"), is_repeated=False),) * 3


def _attention(prefix: str, width: int, parts: tuple[Part, ...]) -> Iterator[Weight]:
    yield from linear(EVERYWHERE, f"{prefix}.attn.qkv", parts, width, "rows", bias=True)
    yield from linear(EVERYWHERE, f"{prefix}.attn.proj", Part(width), width, "cols", bias=True)


def _merger(vision: Sizes, width: int, out: int, first: str, second: str) -> Iterator[Weight]:
    merged = vision.size("spatial_merge_size", 2) ** 2 * width
    yield from two_layers(EVERYWHERE, (first, second), (merged, merged, out))
