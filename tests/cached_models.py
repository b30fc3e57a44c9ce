"""Configs of tiny models with caches of other kinds than keys and values of equal size in every layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

Entries = Mapping[str, Any]

TINY: Entries = dict(
    vocab_size=260, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, rope_theta=10000.0,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)  # fmt: skip
EXPERTS: Entries = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    n_shared_experts=1, num_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, norm_topk_prob=True,
    routed_scaling_factor=1.0,
)  # fmt: skip
LATENT: Entries = {
    **TINY, **EXPERTS, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "q_lora_rank": 128,
}  # fmt: skip
SPARSE: Entries = {**LATENT, "index_topk": 64, "index_n_heads": 4, "index_head_dim": 128}
BAILING: Entries = {
    **LATENT, "head_dim": 128, "use_qk_norm": True, "use_bias": False, "use_qkv_bias": False, "rotary_dim": 64,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "group_norm_size": 4, "linear_silu": False,
    "num_nextn_predict_layers": 0, "moe_shared_expert_intermediate_size": 128,
}  # fmt: skip
KDA: Entries = dict(
    kda_layers=[1, 2, 3], full_attn_layers=[4], num_heads=4, head_dim=128, short_conv_kernel_size=4
)

# a name: architecture, class of config in Transformers or a model_type without one, entries
MODELS: dict[str, tuple[str, str, Entries]] = {
    "AXK1": ("AXK1ForCausalLM", "AXK1Config", LATENT),
    "Ling 2.5": ("BailingMoeV2_5ForCausalLM", "bailing_hybrid", {**BAILING, "layer_group_size": 4}),
    "Ling 3": (
        "BailingMoeV3ForCausalLM", "bailing_hybrid",
        {**BAILING, "layer_group_size": 3, "short_conv_kernel_size": 4, "no_kda_lora": True},
    ),
    "DeepSeek V3.2": ("DeepseekV32ForCausalLM", "DeepseekV32Config", SPARSE),
    "GLM 5": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", SPARSE),
    "GLM 5, every second indexer": (
        "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", {**SPARSE, "index_topk_freq": 2, "index_skip_topk_offset": 1},
    ),
    "GLM 5, a pattern of indexers": (
        "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", {**SPARSE, "index_topk_pattern": "FSSF"},
    ),
    "Kimi Linear": (
        "KimiLinearForCausalLM", "KimiLinearConfig",
        {**LATENT, "q_lora_rank": None, "mla_use_nope": True, "num_experts_per_token": 2, "linear_attn_config": KDA},
    ),
    "LongCat Flash": (
        "LongcatFlashForCausalLM", "LongcatFlashConfig",
        {
            **LATENT, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 256, "expert_ffn_hidden_size": 128,
            "zero_expert_num": 2, "zero_expert_type": "identity", "moe_topk": 2, "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
    ),
    "MiMo V2": (
        "MiMoV2FlashForCausalLM", "MiMoV2FlashConfig",
        {
            **TINY, **EXPERTS, "head_dim": 48, "v_head_dim": 32, "swa_head_dim": 48, "swa_v_head_dim": 32,
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "sliding_window": 128,
            "sliding_window_size": 128, "hybrid_layer_pattern": [0, 1, 1, 0], "layernorm_epsilon": 1e-5,
            "moe_layer_freq": [0, 1, 1, 1],
        },
    ),
    "MiniMax M2": (
        "MiniMaxM2ForCausalLM", "MiniMaxM2Config",
        {
            **TINY, **EXPERTS, "attn_type_list": [1, 1, 1, 1], "head_dim": 32, "rotary_dim": 16,
            "scoring_func": "sigmoid",
        },
    ),
    "Olmo Hybrid": (
        "OlmoHybridForCausalLM", "OlmoHybridConfig",
        {**TINY, "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 96,
         "linear_value_head_dim": 192},
    ),
    "Pangu Ultra": (
        "PanguUltraMoEForCausalLM", "pangu_ultra_moe",
        {
            **LATENT, "sandwich_norm": True, "num_dense_layers": 1, "num_routed_experts": 4, "num_mtp_layers": 0,
            "attention_bias": False,
        },
    ),
    "Sarvam": (
        "SarvamMLAForCausalLM", "sarvam_mla",
        {**LATENT, "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "attention_bias": False},
    ),
    "Step 3.5": (
        "Step3p5ForCausalLM", "step3p5",
        {
            **TINY, **EXPERTS, "num_attention_groups": 2, "head_dim": 32, "sliding_window": 128,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "attention_other_setting": dict(
                attention_type="sliding_attention", num_attention_heads=8, num_attention_groups=4, head_dim=32
            ),
        },
    ),
}  # fmt: skip


def config_class(name: str) -> Any:
    """Return a class of config; for a model_type whose class Transformers lacks, a bare one."""
    found = getattr(transformers, name, None)
    return found or type(name, (transformers.PreTrainedConfig,), {"model_type": name})


def register() -> None:
    """Tell Transformers, in this process, of the model types that it lacks."""
    for _, name, _ in MODELS.values():
        if name.islower():
            transformers.AutoConfig.register(name, config_class(name), exist_ok=True)


def save(name: str, folder: Path) -> Path:
    """Write the config.json of a model into `folder`, and return it."""
    architecture, kind, entries = MODELS[name]
    found = {**config_class(kind)(**entries).to_dict(), **entries}
    folder.mkdir(parents=True, exist_ok=True)
    found |= dict(architectures=[architecture], dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(found))
    return folder
