"""The table of architectures that are compared with BF16 vLLM, and their tiny random models.

Models come from Transformers' configs and model classes. Also a script: it prints the tables of docs/serving.md.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

SEED = 20240611
SHAPE: dict[str, Any] = dict(
    vocab_size=260, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=256, initializer_range=0.02, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
Entries = Mapping[str, Any]
RECORD = Path(__file__).parent / "data" / "architectures.json"  # made by architecture_features.py
RECORD_OF_VERSIONS = RECORD.parent / "architectures_versions.json"  # likewise, with older versions
WORDS = {  # beginnings of results in the record
    "refused": "refused in a sentence, weights as before",
    "BF16 vLLM": "BF16 vLLM gives the same error",
    "no plan": "refused in a sentence",
    "estimate": "an estimate, and it says so",
    "not run": "not run",
}


def _each(names: Iterable[str], entries: Entries) -> dict[str, Entries]:
    return dict.fromkeys(names, entries)


_EXPERTS: Entries = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=128,
    shared_expert_intermediate_size=128, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
_FEW: Entries = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
_NARROW: Entries = {**_EXPERTS, "intermediate_size": 128}
_LATENT: Entries = dict(
    num_key_value_heads=2, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=128,
)  # fmt: skip
_MAMBA: Entries = dict(
    mamba_n_heads=4, mamba_d_head=64, mamba_d_state=16, mamba_n_groups=1, shared_intermediate_size=128,
)  # fmt: skip
_LINEAR: Entries = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=64, linear_value_head_dim=64,
)  # fmt: skip

DENSE, MIXTURE, LATENT, HYBRID = (
    "dense",
    "mixture of experts",
    "latent attention",
    "state space, convolutions, linear attention",
)
# kind: class of Transformers (and a variant): what differs from SHAPE
EQUAL: dict[str, dict[str, Entries]] = {
    DENSE: {
        **_each(
            (
                "ApertusForCausalLM", "ArceeForCausalLM", "BitNetForCausalLM", "BloomForCausalLM", "CohereForCausalLM",
                "Cohere2ForCausalLM", "CTRLLMHeadModel", "CwmForCausalLM", "DogeForCausalLM", "Ernie4_5ForCausalLM",
                "Exaone4ForCausalLM", "FalconForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
                "Gemma4ForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM",
                "GPTJForCausalLM", "GPTNeoXForCausalLM", "GraniteForCausalLM", "GraniteSWAForCausalLM",
                "HeliumForCausalLM", "HrmTextForCausalLM", "HunYuanDenseV1ForCausalLM", "HyperCLOVAXForCausalLM",
                "Jais2ForCausalLM", "LlamaForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM",
                "NanoChatForCausalLM", "NemotronForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
                "OPTForCausalLM", "PersimmonForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
                "Qwen3ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM",
                "Starcoder2ForCausalLM", "VaultGemmaForCausalLM",
            ),
            {},
        ),
        "Gemma3nForCausalLM": dict(
            num_hidden_layers=10, num_kv_shared_layers=5, layer_types=["sliding_attention", "full_attention"] * 5,
            hidden_size_per_layer_input=64, laurel_rank=32, vocab_size_per_layer_input=260,
            activation_sparsity_pattern=[0.0] * 10, altup_num_inputs=2,
        ),
        "GPT2LMHeadModel, odd vocabulary": dict(vocab_size=257),
        "LlamaForCausalLM, scaled rotary embedding": dict(
            rope_parameters=dict(
                rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=128,
            ),
        ),
        "MistralForCausalLM, sliding window": dict(sliding_window=32),
        "Qwen2ForCausalLM, tied": dict(tie_word_embeddings=True),
        "StableLmForCausalLM, biases": dict(use_qkv_bias=True),
    },
    MIXTURE: {
        **_each(
            (
                "Cohere2MoeForCausalLM", "Dots1ForCausalLM", "Ernie4_5_MoeForCausalLM", "Glm4MoeForCausalLM",
                "GptOssForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM", "JetMoeForCausalLM",
                "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "SolarOpenForCausalLM",
            ),
            _EXPERTS,
        ),
        "AfmoeForCausalLM": {
            **_EXPERTS, "num_dense_layers": 1, "score_func": "sigmoid", "route_norm": True, "route_scale": 1.0,
        },
        "ExaoneMoeForCausalLM": _NARROW,
        "FlexOlmoForCausalLM": _NARROW,
        "HunYuanMoEV1ForCausalLM": dict(num_experts=4, moe_topk=2, intermediate_size=128),
        "Llama4ForCausalLM": {
            **_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2,
        },
        "MixtralForCausalLM, tied": {**_EXPERTS, "tie_word_embeddings": True},
        "Qwen3MoeForCausalLM": _FEW,
    },
    LATENT: {
        "DeepseekV2ForCausalLM": {
            **_NARROW, **_LATENT, "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy",
        },
        "DeepseekV3ForCausalLM": {**_EXPERTS, **_LATENT, "topk_method": "noaux_tc"},
        "Glm4MoeLiteForCausalLM": {**_NARROW, **_LATENT},
        "MiniCPM3ForCausalLM": dict(
            kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, q_lora_rank=128
        ),
    },
    HYBRID: {
        "FalconH1ForCausalLM": dict(
            mamba_d_ssm=128, mamba_n_heads=2, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=16
        ),
        "GraniteMoeHybridForCausalLM": {**_NARROW, **_MAMBA, "layer_types": ["mamba", "attention"]},
        "Lfm2MoeForCausalLM": {**_NARROW, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "Mamba2ForCausalLM": dict(
            state_size=16, intermediate_size=256, expand=2, head_dim=64, num_heads=4, n_groups=1
        ),
        "NemotronHForCausalLM": dict(
            hybrid_override_pattern="M*-", num_hidden_layers=3, mamba_num_heads=4, mamba_head_dim=64, ssm_state_size=16,
            n_groups=1,
        ),
        "Qwen3NextForCausalLM": {**_NARROW, **_LINEAR},
        "Zamba2ForCausalLM": dict(
            num_hidden_layers=3, num_key_value_heads=2, attention_head_dim=128, attention_hidden_size=256,
            layers_block_type=["mamba", "hybrid", "mamba"], hybrid_layer_ids=[1], mamba_d_state=16, num_mem_blocks=1,
            n_mamba_heads=4, mamba_ngroups=1,
        ),
    },
}  # fmt: skip
CASES: dict[str, Entries] = {
    name: entries for kind in EQUAL.values() for name, entries in kind.items()
}


def has_experts(name: str) -> bool:
    """Return whether a model has routed experts in layers of vLLM; JetMoe has layers of Transformers."""
    if name == "JetMoeForCausalLM":
        return False
    return name in EQUAL[MIXTURE] or bool({"num_experts", "n_routed_experts"} & {*CASES[name]})


# Always run; the others only with --full. One of each way in which layers are built, tied, fused or left alone.
CORE = (
    "LlamaForCausalLM", "Gemma2ForCausalLM", "Gemma3nForCausalLM", "CohereForCausalLM", "BloomForCausalLM",
    "GPT2LMHeadModel, odd vocabulary", "CTRLLMHeadModel", "Phi3ForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM",
    "Llama4ForCausalLM", "DeepseekV3ForCausalLM", "GraniteMoeHybridForCausalLM", "Qwen3NextForCausalLM",
    "Zamba2ForCausalLM",
)  # fmt: skip
# BF16 vLLM 0.32 itself does not run these tiny models on a CPU.
NOT_RUN: dict[str, str] = {
    "BambaForCausalLM, DiffLlamaForCausalLM, MiniMaxForCausalLM, RecurrentGemmaForCausalLM": (
        "the Transformers backend refuses their attention"
    ),
    "BioGptForCausalLM": "an error about strides in the Transformers backend",
    "CodeGenForCausalLM, GPTNeoForCausalLM, XGLMForCausalLM": "not supported any more",
    "FalconMambaForCausalLM, JambaForCausalLM, MambaForCausalLM": "an IndexError in its Mamba mixer while loading",
    "GlmMoeDsaForCausalLM": "no sparse attention on a CPU",
    "MptForCausalLM": "not supported since 0.28",
    "OlmoHybridForCausalLM": "its kernel needs Triton's allocator",
    "PhimoeForCausalLM": "fails in Transformers' router",
    "Qwen3_5ForCausalLM": "needs torchvision, which its CPU build lacks here",
    "YoutuForCausalLM": "a head of 64 is too small for latent attention",
}


def model_class(name: str) -> str:
    """Return the class of Transformers of an entry of the table, which may name a variant after a comma."""
    return name.partition(",")[0]


def save_case(name: str, path: Path, seed: int = SEED) -> Path:
    shape = dict(SHAPE)
    if name.startswith("Falcon") and "H1" not in name:
        del shape["head_dim"]  # its config computes it
    if name.startswith(
        ("Bloom", "GPT2", "GPTJ", "OPT")
    ):  # these know neither, and it would be a wrong entry
        del shape["head_dim"], shape["num_key_value_heads"]
    return save(model_class(name), path, {**shape, **CASES[name]}, seed)


def save(model_class: str, path: Path, config: Entries, seed: int = SEED) -> Path:
    """Write a random BF16 checkpoint of a class of Transformers into the folder `path`, and return it."""
    made = getattr(transformers, model_class).config_class(**config)
    return save_config(model_class, path, made, seed)


def save_config(model_class: str, path: Path, config: Any, seed: int = SEED) -> Path:
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.02)
        elif not parameter.any():  # Gemma 3's projector begins as zeros, and no image would matter
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def tables() -> str:
    """Return the two tables of docs/serving.md."""
    import encoder_decoders  # they use this module
    import multimodal_models

    lines = ["| kind | equal to BF16 vLLM, from BF16 and from DFloat11 files |", "|---|---|"]
    for kind, cases in EQUAL.items():
        names = sorted({model_class(name) for name in cases}, key=str.lower)
        lines.append(f"| {kind} ({len(names)}) | {', '.join(map(short, names))} |")
    names = sorted({**multimodal_models.MODELS, **encoder_decoders.MODELS}, key=str.lower)
    lines.append(f"| with images or sound ({len(names)}) | {', '.join(map(short, names))} |")
    lines += ["", "| BF16 vLLM 0.32 does not run on that CPU | why |", "|---|---|"]
    for names, why in NOT_RUN.items():
        lines.append(f"| {', '.join(map(short, names.split(', ')))} | {why} |")
    return "\n".join(lines)


def feature_table() -> str:
    """Return the table of features of docs/serving.md, from the record of a run."""
    found: dict[str, dict[str, str]] = json.loads(RECORD.read_text())
    lines = [
        "| of the models of this list, with vLLM 0.32 | equal to BF16 vLLM | others |",
        "|---|---|---|",
    ]
    for feature in next(iter(found.values())):
        others: dict[str, list[str]] = defaultdict(list)
        for name in sorted(found, key=str.lower):
            if (result := found[name][feature]) != "equal":
                others[_in_words(result)].append(short(model_class(name)))
        count = len(found) - sum(map(len, others.values()))
        why = "; ".join(
            f"{words}: {', '.join(dict.fromkeys(names))}" for words, names in others.items()
        )
        lines.append(f"| {feature} | {count} of {len(found)} | {why} |")
    return "\n".join(lines)


def version_table() -> str:
    """Return the table of vLLM versions of docs/serving.md, from the records of runs with files of both kinds."""
    recorded: dict[str, dict[str, dict[str, str]]] = json.loads(RECORD_OF_VERSIONS.read_text())
    lines = ["| vLLM | equal to BF16 vLLM | BF16 vLLM itself fails |", "|---|---|---|"]
    for version, found in recorded.items():
        failed: dict[str, list[str]] = defaultdict(list)
        for name in sorted(found, key=str.lower):
            if (result := found[name]["BF16 files"]) != "equal":
                failed[result.partition(": ")[2]].append(short(model_class(name)))
        count = len(found) - sum(map(len, failed.values()))
        why = "; ".join(
            f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in failed.items()
        )
        lines.append(f"| {version} | {count} of {len(found)} | {why} |")
    return "\n".join(lines)


def _in_words(result: str) -> str:
    for kind, words in WORDS.items():
        if result.startswith(kind):
            return words
    return "not equal"


def short(name: str) -> str:
    for ending in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"):
        name = name.removesuffix(ending)
    return name


if __name__ == "__main__":
    print(f"{tables()}\n\n{feature_table()}\n\n{version_table()}")
