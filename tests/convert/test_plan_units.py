"""The tensors that form each unit, and the patterns that name them."""

import re
from pathlib import Path

import pytest

from vllm_dfloat.checkpoint.patterns import compile_patterns
from vllm_dfloat.convert.units import PlannedUnit, build_patterns, plan_units
from vllm_dfloat.storage.stored_tensor import StoredTensor

LL = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LL += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def stored(*names: str, shape: tuple[int, ...] = (64, 32), dtype: str = "BF16") -> dict:
    return {name: StoredTensor(Path("f"), name, dtype, shape, 0, 2 * 64 * 32) for name in names}


def layer(prefix: str, members: list[str]) -> dict:
    return stored(*(f"{prefix}.{member}.weight" for member in sorted(members))) | stored(
        f"{prefix}.input_layernorm.weight", shape=(64,)
    )


def units_of(config: dict, tensors: dict) -> dict[str, list[str]]:
    return {unit.name: list(unit.members) for unit in plan_units(config, tensors).units}


def test_llama_has_the_published_units_and_order() -> None:
    tensors = stored("lm_head.weight", "model.embed_tokens.weight")
    tensors |= layer("model.layers.0", LL) | layer("model.layers.10", LL)
    tensors |= layer("model.layers.2", LL) | stored("model.norm.weight", shape=(64,))
    plan = plan_units({"tie_word_embeddings": False}, tensors)
    names = ["lm_head", "model.embed_tokens"]
    names += ["model.layers.0", "model.layers.2", "model.layers.10"]
    assert [unit.name for unit in plan.units] == names
    assert [list(unit.members) for unit in plan.units] == [[], [], LL, LL, LL]
    assert not plan.left
    assert build_patterns(plan.units) == {
        "lm_head": [],
        r"model\.embed_tokens": [],
        r"model\.layers\.\d+": LL,
    }


def test_phi_has_o_proj_before_qkv_proj_as_published() -> None:
    order = ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert units_of({}, layer("model.layers.0", order)) == {"model.layers.0": order}


def test_gemma_3_compresses_the_layers_of_its_language_model_only() -> None:
    tensors = layer("language_model.model.layers.0", LL)
    tensors |= stored("language_model.model.embed_tokens.weight")
    tensors |= stored("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")
    plan = plan_units({"architectures": ["Gemma3ForConditionalGeneration"]}, tensors)
    assert [unit.name for unit in plan.units] == ["language_model.model.layers.0"]
    assert sorted(plan.left) == [
        "language_model.model.embed_tokens.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
    ]


def test_qwen_2_5_vl_has_the_published_units_of_its_tower() -> None:
    vision = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    tensors = layer("visual.blocks.0", vision) | layer("model.layers.0", LL)
    tensors |= stored("visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "lm_head.weight")
    tensors |= stored("visual.patch_embed.proj.weight", shape=(64, 3, 2, 14, 14))
    plan = plan_units({"tie_word_embeddings": False}, tensors)
    assert {unit.name: list(unit.members) for unit in plan.units} == {
        "lm_head": [],
        "model.layers.0": LL,
        "visual.blocks.0": vision,
        "visual.merger.mlp": ["0", "2"],
    }
    assert list(plan.left) == ["visual.patch_embed.proj.weight"]


def test_flux_has_the_published_order_with_add_q_last() -> None:
    order = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
    tensors = layer("single_transformer_blocks.0", order) | stored("x_embedder.weight")
    config = {"_class_name": "FluxTransformer2DModel"}
    assert units_of(config, tensors) == {"single_transformer_blocks.0": order}


@pytest.mark.parametrize(
    ("config", "lm_head", "expected"),
    [
        ({"tie_word_embeddings": True}, False, []),
        ({"tie_word_embeddings": True}, True, []),
        ({"text_config": {"tie_word_embeddings": True}}, False, []),
        ({}, False, []),
        ({}, True, ["lm_head", "model.embed_tokens"]),
        ({"tie_word_embeddings": False}, True, ["lm_head", "model.embed_tokens"]),
    ],
)
def test_tied_embeddings_stay_as_they_are(config: dict, lm_head: bool, expected: list[str]) -> None:
    tensors = stored("model.embed_tokens.weight", *["lm_head.weight"] * lm_head)
    tensors |= layer("model.layers.0", LL)
    assert [name for name in units_of(config, tensors) if "layers" not in name] == expected


HEADLESS = {
    "BertModel": "embeddings.word_embeddings",
    "XLMRobertaForSequenceClassification": "roberta.embeddings.word_embeddings",
    "ModernBertModel": "embeddings.tok_embeddings",
    "T5EncoderModel": "encoder.embed_tokens",
    "GPT2Model": "wte",
    "Qwen3Model": "embed_tokens",
    "MistralForTokenClassification": "model.embed_tokens",
    "LlamaForRewardModel": "model.embed_tokens",
}


@pytest.mark.parametrize("tied", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("architecture", HEADLESS)
def test_the_embedding_of_a_model_without_lm_head_is_compressed(
    architecture: str, tied: dict
) -> None:
    # Bug caught: half of an encoder left in BF16, because configs of encoders have no entry for ties, or its default.
    embedding = HEADLESS[architecture]
    tensors = stored(f"{embedding}.weight") | layer("encoder.layer.0", ["attention.self.query"])
    found = units_of({"architectures": [architecture], **tied}, tensors)
    assert found == {"encoder.layer.0": ["attention.self.query"], embedding: []}


@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "GPT2DoubleHeadsModel", "BertForMaskedLM", "T5ForConditionalGeneration",
     "VisionEncoderDecoderModel", "Qwen3ForCausalLM", "InternVLChatModel", "ChatGLMModel"],
)  # fmt: skip
def test_the_tied_embedding_of_a_model_with_lm_head_stays(architecture: str) -> None:
    tensors = stored(
        "model.embed_tokens.weight", "word_embeddings.weight", "backbone.embeddings.weight"
    )
    for config in ({}, {"tie_word_embeddings": True}):
        plan = plan_units({"architectures": [architecture], **config}, tensors)
        assert plan.units == ()
        assert "embedding and output layer in one" in plan.left["word_embeddings.weight"]


@pytest.mark.parametrize("name", [["Flux"], {}, None, 5])
def test_an_architecture_that_is_no_name_is_passed_over(name: object) -> None:
    # Bug caught: TypeError, unhashable.
    tensors = layer("model.layers.0", LL)
    for config in ({"architectures": [name]}, {"_class_name": name}, {"architectures": name}):
        assert units_of(config, tensors) == {"model.layers.0": LL}


def test_each_expert_is_a_unit_and_routers_and_gates_of_fp32_stay() -> None:
    attention = layer("model.layers.1", LL[:4])
    experts = [f"model.layers.1.mlp.experts.{i}" for i in (0, 1, 11)]
    projections = ["gate_proj", "up_proj", "down_proj"]
    tensors = dict(attention)
    for expert in experts:
        tensors |= stored(*(f"{expert}.{name}.weight" for name in projections))
    tensors |= stored("model.layers.1.mlp.gate.weight")
    tensors |= stored("model.layers.1.mlp.shared_experts.up_proj.weight")
    tensors |= stored("model.layers.1.mlp.other.weight", dtype="F32")
    plan = plan_units({"tie_word_embeddings": False}, tensors)
    found = {unit.name: list(unit.members) for unit in plan.units}
    shared = ["mlp.shared_experts.up_proj"]
    assert found == {"model.layers.1": LL[:4] + shared} | dict.fromkeys(experts, projections)
    assert sorted(plan.left) == [
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.other.weight",
    ]
    assert "F32" in plan.left["model.layers.1.mlp.other.weight"]
    key = r"model\.layers\.\d+\.mlp\.experts\.\d+"
    assert build_patterns(plan.units)[key] == projections


def test_experts_in_one_tensor_are_members_of_their_module() -> None:
    base = "model.layers.0.mlp.experts"
    tensors = stored(f"{base}.gate_up_proj", f"{base}.down_proj", shape=(4, 64, 32))
    tensors |= stored(f"{base}.gate_up_proj_bias", shape=(4, 64)) | layer("model.layers.0", LL[:4])
    plan = plan_units({}, tensors)
    assert plan.units[1] == PlannedUnit(
        base, ("gate_up_proj", "down_proj"), (f"{base}.gate_up_proj", f"{base}.down_proj")
    )
    assert list(plan.left) == [f"{base}.gate_up_proj_bias"]


def test_blocks_that_differ_are_listed_in_patterns_that_no_other_block_matches() -> None:
    # Bug caught: a pattern with `\d+` and one with a list match the same unit, and a reader refuses the checkpoint.
    odd = {3, 77, 301}
    units = [
        PlannedUnit(
            f"model.layers.{i}", ("a",) if i in odd else ("a", "b"), ("t",) * (2 - (i in odd))
        )
        for i in range(400)
    ]
    found = build_patterns(units)
    assert all(len(key) <= 256 for key in found)
    patterns = compile_patterns(found, "here")
    for unit in units:
        assert patterns.members(unit.name) == unit.members
        assert sum(bool(re.fullmatch(key, unit.name)) for key in found) == 1
    assert patterns.members("model.layers.400") is None


def test_names_of_mixtral_and_granite_give_units_of_experts() -> None:
    mixtral = "model.layers.0.block_sparse_moe.experts.3"
    granite = "model.layers.0.block_sparse_moe"
    tensors = stored(f"{mixtral}.w2.weight", f"{mixtral}.w1.weight")
    fused = stored(f"{granite}.input_linear.weight", shape=(4, 64, 32))
    assert units_of({}, tensors) == {mixtral: ["w1", "w2"]}
    assert units_of({}, fused) == {granite: ["input_linear"]}
