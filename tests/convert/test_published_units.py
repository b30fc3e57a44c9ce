"""The units of every published release of a language model, from its config and the names in its weight files.

The names are those of the original models on the hub, with two layers each. Published patterns have dots in two
spellings, plain and escaped; ours are escaped, so that they match nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_dfloat.checkpoint.patterns import compile_patterns
from vllm_dfloat.convert.units import build_patterns, plan_units
from vllm_dfloat.storage.stored_tensor import StoredTensor

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LL = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PHI = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
VISUAL = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]
QK_NORMS = ["self_attn.q_norm", "self_attn.k_norm"]
GEMMA_NORMS = [*NORMS, *QK_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
QKV_BIAS = [f"self_attn.{name}_proj" for name in "qkv"]

MATRIX, VECTOR = (64, 32), (64,)
BARE, ESCAPED = "bare", "escaped"


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Return the tensors in the order of a safetensors file: by name."""
    return {
        name: StoredTensor(Path("f"), name, "BF16", shapes[name], 0, 4096)
        for name in sorted(shapes)
    }


def layers(
    prefix: str, weights: list[str], norms: list[str], biases: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the names of two layers."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        found |= {f"{prefix}.{i}.{name}.weight": MATRIX for name in weights}
        found |= {f"{prefix}.{i}.{name}.weight": VECTOR for name in norms}
        found |= {f"{prefix}.{i}.{name}.bias": VECTOR for name in biases}
    return found


def text_model(
    weights: list[str], norms: list[str], biases: Sequence[str] = (), lm_head: bool = True
) -> dict[str, tuple[int, ...]]:
    head = {"lm_head.weight": MATRIX} if lm_head else {}
    ends = {"model.embed_tokens.weight": MATRIX, "model.norm.weight": VECTOR}
    return head | ends | layers("model.layers", weights, norms, biases)


LLAMA, QWEN3 = text_model(LL, NORMS), text_model(LL, NORMS + QK_NORMS)
QWEN2 = text_model(LL, NORMS, QKV_BIAS)
QWEN3_TIED = text_model(LL, NORMS + QK_NORMS, lm_head=False)
PHI3 = text_model(PHI, NORMS)
SIGLIP = layers(
    "vision_tower.vision_model.encoder.layers",
    [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"],
    ["layer_norm1", "layer_norm2"],
)
GEMMA3 = (
    layers("language_model.model.layers", LL, GEMMA_NORMS)
    | SIGLIP
    | {
        "language_model.model.embed_tokens.weight": MATRIX,
        "language_model.model.norm.weight": VECTOR,
        "multi_modal_projector.mm_input_projection_weight": MATRIX,
        "multi_modal_projector.mm_soft_emb_norm.weight": VECTOR,
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (8, 3, 14, 14),
        "vision_tower.vision_model.embeddings.position_embedding.weight": MATRIX,
    }
)
QWEN2_5_VL = (
    QWEN2
    | layers("visual.blocks", VISUAL, ["norm1", "norm2"], VISUAL)
    | {
        "visual.patch_embed.proj.weight": (8, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": VECTOR,
        "visual.merger.mlp.0.weight": MATRIX,
        "visual.merger.mlp.0.bias": VECTOR,
        "visual.merger.mlp.2.weight": MATRIX,
        "visual.merger.mlp.2.bias": VECTOR,
    }
)

UNTIED = {"lm_head": [], "model.embed_tokens": []}
OF_LLAMA = UNTIED | {r"model.layers.\d+": LL}
OF_LLAMA_ESCAPED = {"lm_head": [], r"model\.embed_tokens": [], r"model\.layers\.\d+": LL}
OF_QWEN_VL = OF_LLAMA_ESCAPED | {r"visual\.blocks\.\d+": VISUAL, r"visual\.merger\.mlp": ["0", "2"]}

# Releases -> architecture, whether the embeddings are tied, names, the published pattern_dict and its spelling.
PUBLISHED = {
    "Llama-3.1-8B-Instruct, DeepSeek-R1-Distill-Llama-8B": (
        "LlamaForCausalLM", False, LLAMA, OF_LLAMA, BARE,
    ),
    "Qwen3-8B, 14B and 32B, DeepSeek-R1-0528-Qwen3-8B": ("Qwen3ForCausalLM", False, QWEN3, OF_LLAMA, BARE),
    "Qwen2.5-14B-Instruct, QwQ-32B, DeepSeek-R1-Distill-Qwen-7B, 14B and 32B": (
        "Qwen2ForCausalLM", False, QWEN2, OF_LLAMA, BARE,
    ),
    "Llama-3.3-70B-Instruct": ("LlamaForCausalLM", False, LLAMA, OF_LLAMA_ESCAPED, ESCAPED),
    "Mistral-Nemo-Instruct-2407, Mistral-Small-24B-Instruct-2501": (
        "MistralForCausalLM", False, LLAMA, OF_LLAMA_ESCAPED, ESCAPED,
    ),
    "Qwen3-4B": ("Qwen3ForCausalLM", True, QWEN3_TIED, {r"model.layers.\d+": LL}, BARE),
    "gemma-3-4b, 12b and 27b-it": (
        "Gemma3ForConditionalGeneration", None, GEMMA3, {r"language_model.model.layers.\d+": LL}, BARE,
    ),
    "Phi-4-reasoning-plus": ("Phi3ForCausalLM", False, PHI3, UNTIED | {r"model.layers.\d+": PHI}, BARE),
    "OmniGen2-mllm": ("Qwen2_5_VLForConditionalGeneration", False, QWEN2_5_VL, OF_QWEN_VL, ESCAPED),
}  # fmt: skip


def planned(architecture: str, tied: bool | None, shapes: dict) -> dict[str, list[str]]:
    config = {"architectures": [architecture]}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    return build_patterns(plan_units(config, tensors(shapes)).units)


@pytest.mark.parametrize("release", PUBLISHED)
def test_patterns_are_those_of_the_release(release: str) -> None:
    architecture, tied, shapes, expected, spelling = PUBLISHED[release]
    found = planned(architecture, tied, shapes)
    if spelling == BARE:
        found = {key.replace(r"\.", "."): members for key, members in found.items()}
    assert found == expected


@pytest.mark.parametrize("release", PUBLISHED)
def test_both_spellings_match_the_same_modules(release: str) -> None:
    architecture, tied, shapes, expected, _ = PUBLISHED[release]
    ours = compile_patterns(planned(architecture, tied, shapes), "ours")
    theirs = compile_patterns(expected, "theirs")
    paths = {name.rpartition(".")[0] for name in shapes}
    paths |= {
        ".".join(path.split(".")[:i]) for path in paths for i in range(1, path.count(".") + 1)
    }
    matched = {path: ours.members(path) for path in sorted(paths)}
    assert matched == {path: theirs.members(path) for path in sorted(paths)}
    assert any(members for members in matched.values())


def test_qwen_2_5_vl_has_the_same_units_below_the_prefixes_of_newer_files() -> None:
    prefixes = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {}
    for name, shape in QWEN2_5_VL.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name.removeprefix(old)] = shape
    found = planned("Qwen2_5_VLForConditionalGeneration", False, renamed)
    assert found == {
        "lm_head": [],
        r"model\.language_model\.embed_tokens": [],
        r"model\.language_model\.layers\.\d+": LL,
        r"model\.visual\.blocks\.\d+": VISUAL,
        r"model\.visual\.merger\.mlp": ["0", "2"],
    }


def test_towers_of_models_that_were_never_released_are_compressed_too() -> None:
    shapes = text_model(LL, NORMS) | SIGLIP | {"multi_modal_projector.linear_1.weight": MATRIX}
    found = planned("LlavaForConditionalGeneration", False, shapes)
    tower = r"vision_tower\.vision_model\.encoder\.layers\.\d+"
    assert sorted(found[tower]) == sorted(
        [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    )
    assert found[r"multi_modal_projector\.linear_1"] == []
    assert found[r"model\.layers\.\d+"] == LL
