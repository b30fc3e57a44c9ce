"""Parameters of published models from their configs alone, and names and shapes against what Transformers writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.plan.architectures import known_weights
from vllm_dfloat.plan.config import ModelConfig, read_model_config
from vllm_dfloat.plan.defaults import DEFAULTS
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.weights import Weight

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PUBLISHED = {  # data/configs/README.md says where
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-4-Maverick-17B-128E-Instruct": 401_583_781_376,
    "Llama-4-Scout-17B-16E-Instruct": 108_641_793_536,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-27b-it": 27_432_406_640,
    "Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "GLM-4.5": 352_797_829_024,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen2-57B-A14B": 57_408_658_944,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V2": 235_741_434_880,
    "DeepSeek-V3": 671_026_419_200,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "Mistral-Small-3.1-24B-Instruct-2503": 24_011_361_280,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "llava-1.5-7b-hf": 7_063_427_072,
}
LEFT_OUT = {"llava-1.5-7b-hf": 12_596_224 + 2048}  # a layer whose output is not used, and a norm


def config_of(name: str, tmp_path: Path) -> ModelConfig:
    """Return a published config, as if its weights were in BF16."""
    entries = json.loads((CONFIGS / f"{name}.json").read_text())
    entries.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return read_model_config(tmp_path / "config.json")


def weights_of(name: str, tmp_path: Path) -> list[Weight]:
    return known_weights(config_of(name, tmp_path))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_alone_gives_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    found = sum(weight.numel for weight in weights_of(name, tmp_path))
    assert found == PUBLISHED[name] - LEFT_OUT.get(name, 0)


@pytest.mark.parametrize(
    ("name", "embeddings", "rest"),
    [("gemma-3-4b-it", 675, 3209), ("gemma-3-12b-it", 1012, 10759), ("gemma-3-27b-it", 1416, 25600)],
)  # fmt: skip
def test_gemmas_tower_and_text_have_the_sizes_of_its_report(
    name: str, embeddings: int, rest: int, tmp_path: Path
) -> None:
    weights = weights_of(name, tmp_path)
    tower = sum(w.numel for w in weights if w.name.startswith("vision_tower"))
    (embedding,) = (w.numel for w in weights if w.name.endswith("embed_tokens"))
    text = sum(w.numel for w in weights if not w.is_of_tower) - embedding
    assert round(tower / 1e6) == 417
    # The report sometimes rounds differently, and counts 262144 tokens; the embedding has 64 more.
    assert embedding / 1e6 == pytest.approx(embeddings, rel=0.006)
    assert text / 1e6 == pytest.approx(rest, rel=0.01)


def test_convolutions_and_projections_without_a_method_do_not_count_as_compressed(
    tmp_path: Path,
) -> None:
    gemma = {w.name for w in weights_of("gemma-3-4b-it", tmp_path) if w.is_compressed}
    assert not any("patch" in name or "position" in name for name in gemma)
    assert "multi_modal_projector.mm_input_projection_weight" not in gemma
    block = "vision_tower.vision_model.encoder.layers.0"
    assert f"{block}.self_attn.qkv_proj" in gemma
    assert f"{block}.mlp.fc1" not in gemma  # 4304 is no multiple of 64
    llama4 = weights_of("Llama-4-Scout-17B-16E-Instruct", tmp_path)
    assert not any(weight.is_compressed for weight in llama4 if weight.is_of_tower)


def test_the_bias_that_corrects_deepseeks_router_takes_four_bytes(tmp_path: Path) -> None:
    weights = weights_of("DeepSeek-V3", tmp_path)
    biases = [w for w in weights if w.name.endswith("e_score_correction_bias")]
    assert [weight.itemsize for weight in biases] == [4] * 58


def test_a_token_of_latent_attention_costs_one_vector_per_layer_on_every_rank(
    tmp_path: Path,
) -> None:
    config_of("DeepSeek-V3", tmp_path)
    for tp in (1, 8):
        plan = make_plan(str(tmp_path), Settings(tp=tp))
        assert plan.kv_bytes_per_token(plan.ranks[0]) == 61 * (512 + 64) * 2
        assert {page.block_size for page in plan.kv_cache.groups[0].pages} == {64}
    plan = make_plan(str(tmp_path), Settings(kv_cache_dtype="fp8"))
    assert plan.kv_bytes_per_token(plan.ranks[0]) == 61 * (512 + 64)


def test_the_weights_that_latent_attention_reads_stay_bf16(tmp_path: Path) -> None:
    weights = weights_of("DeepSeek-V2-Lite", tmp_path)
    read = [weight for weight in weights if weight.name.endswith("kv_b_proj")]
    assert [(w.numel, w.is_compressed) for w in read] == [(16 * (128 + 128) * 512, False)] * 27
    plan = make_plan(str(tmp_path), Settings())
    assert any("latent attention reads (kv_b_proj) stay BF16" in note for note in plan.notes)


def test_a_chunk_holds_no_more_blocks_than_it_has_tokens(tmp_path: Path) -> None:
    config_of("Llama-4-Scout-17B-16E-Instruct", tmp_path)
    plan = make_plan(str(tmp_path), Settings(block_size=16, max_num_batched_tokens=2048))
    assert [len(group.layers) for group in plan.kv_cache.groups] == [12, 12, 12, 12]
    # three groups with chunks of 8192 and 2 * 2048 tokens in flight; one with full attention
    assert plan.kv_cache.blocks_per_request(100_000) == 3 * (8192 + 4096) // 16 + 6250


def test_rotary_tables_of_ten_million_positions_are_counted(tmp_path: Path) -> None:
    plans = []
    for name in ("Llama-4-Scout-17B-16E-Instruct", "Llama-4-Maverick-17B-128E-Instruct"):
        config_of(name, tmp_path)
        plans.append(make_plan(str(tmp_path), Settings()))
    more = plans[0].ranks[0].overhead - plans[1].ranks[0].overhead
    assert more == 2 * 128 * (10_485_760 - 1_048_576)


TINY_TEXT = dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MROPE = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)
TINY_VIT = dict(depth=2, num_heads=4, patch_size=14)
SIGLIP = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_shared_experts=2,
    moe_intermediate_size=32, first_k_dense_replace=1, num_experts_per_tok=2, n_group=1, topk_group=1,
)  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, sliding_window=16), vision_config=dict(SIGLIP, vision_use_head=False),
            mm_tokens_per_image=4,
        ),
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, rope_parameters=MROPE),
            vision_config=dict(TINY_VIT, embed_dim=64, hidden_size=64),
            tie_word_embeddings=False,
        ),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, rope_parameters=MROPE),
            vision_config=dict(TINY_VIT, hidden_size=64, intermediate_size=96, out_hidden_size=64),
            tie_word_embeddings=False,
        ),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, rope_parameters=MROPE),
            vision_config=dict(
                TINY_VIT, hidden_size=64, intermediate_size=96, out_hidden_size=64, num_position_embeddings=16,
                deepstack_visual_indexes=[0],
            ),
            tie_word_embeddings=False,
        ),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, **MOE, rope_parameters=MROPE),
            vision_config=dict(
                TINY_VIT, hidden_size=64, intermediate_size=96, out_hidden_size=64, num_position_embeddings=16,
                deepstack_visual_indexes=[0],
            ),
            tie_word_embeddings=False,
        ),
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        dict(
            text_config=dict(
                TINY_TEXT, intermediate_size_mlp=96, num_local_experts=4, interleave_moe_layer_step=2
            ),
            vision_config=dict(
                hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=56,
                patch_size=14, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32,
            ),
        ),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, model_type="llama", tie_word_embeddings=False),
            vision_config=dict(SIGLIP, model_type="clip_vision_model"),
            tie_word_embeddings=False,
        ),
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        dict(
            text_config=dict(TINY_TEXT, model_type="mistral", tie_word_embeddings=False),
            vision_config=dict(SIGLIP, model_type="pixtral", head_dim=16),
            tie_word_embeddings=False,
        ),
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", dict(TINY_TEXT, **LATENT, head_dim=8, q_lora_rank=None)),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        dict(TINY_TEXT, **LATENT, q_lora_rank=24, topk_method="noaux_tc"),
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        dict(
            TINY_TEXT, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1,
            num_experts_per_tok=2, n_group=1, topk_group=1, use_qk_norm=True, attention_bias=True,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a tiny checkpoint with Transformers, once, and returns its folder."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"shapes-{name}"
        if not folder.exists():
            architecture, entries = TINY[name]
            model_class = getattr(transformers, architecture)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**entries)).to(torch.bfloat16)
            model.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_those_that_transformers_writes(name: str, saved: Any) -> None:
    plan = make_plan(str(saved(name)), Settings())  # refuses what contradicts the config
    assert "shapes checked against the files' headers" in plan.notes
    left_out = [note for note in plan.notes if "not counted: " in note and "tensors" in note]
    # For LLaVA the layer whose output is not used; inv_freq is not a weight.
    assert bool(left_out) is (name == "llava")


def test_a_weight_that_is_missing_is_named_as_vllm_calls_it(saved: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved("qwen2_5_vl") / "model.safetensors")
    del tensors["visual.blocks.1.attn.proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved("qwen2_5_vl") / "config.json").read_text())
    with pytest.raises(DFloatError, match=r"no tensor visual\.blocks\.1\.attn\.proj\.weight"):
        make_plan(str(tmp_path), Settings())


TYPES = {
    "siglip_vision_model": transformers.SiglipVisionConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
    "pixtral": transformers.PixtralVisionConfig,
    "llama4_vision_model": transformers.Llama4VisionConfig,
    "qwen2_vl": lambda: transformers.Qwen2VLConfig().vision_config,
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig().vision_config,
    "qwen3_vl": lambda: transformers.Qwen3VLConfig().vision_config,
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeConfig().vision_config,
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_configs_leave_out_is_what_transformers_assumes(model_type: str) -> None:
    config = (TYPES.get(model_type) or transformers.CONFIG_MAPPING[model_type])()
    for name, value in DEFAULTS[model_type].items():
        assert getattr(config, name) == value, name


def test_more_ranks_than_a_tower_has_heads_are_refused_by_its_name(tmp_path: Path) -> None:
    config_of("Qwen2.5-VL-72B-Instruct", tmp_path)
    with pytest.raises(DFloatError, match=r"--tp 32: visual\.blocks\.0\.attn\.qkv has 16 heads"):
        make_plan(str(tmp_path), Settings(tp=32))


def test_a_tower_is_held_by_every_stage(tmp_path: Path) -> None:
    config = config_of("Qwen2.5-VL-7B-Instruct", tmp_path)
    tower = 2 * sum(w.numel for w in known_weights(config) if w.is_of_tower)
    plan = make_plan(str(tmp_path), Settings(pp=4))
    assert [rank.bf16_towers for rank in plan.ranks] == [tower] * 4
    assert all(rank.dfloat11_towers < 0.75 * tower for rank in plan.ranks)


def test_a_head_of_its_own_is_counted_where_the_config_ties_it(tmp_path: Path) -> None:
    """vLLM unties the two if the checkpoint has both; if they are equal it holds one matrix."""
    from tiny_models import SHIPPED, edit

    entries = json.loads((SHIPPED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "tie_word_embeddings": True}))
    (tmp_path / "model.safetensors").write_bytes((SHIPPED / "model.safetensors").read_bytes())
    config = read_model_config(tmp_path / "config.json")
    matrix = config.vocab * config.hidden
    apart = make_plan(str(tmp_path), Settings())

    def make_equal(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path, make_equal)
    once = make_plan(str(tmp_path), Settings())
    assert apart.parameters - once.parameters == matrix
    assert any("LM head of its own" in note for note in apart.notes)
    assert not any("LM head of its own" in note for note in once.notes)
