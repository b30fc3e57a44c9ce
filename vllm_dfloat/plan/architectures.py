"""The weights of a model from its config alone, for the architectures with rules here."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vllm_dfloat.errors import UnsupportedError, shown
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.decoder import Rules, decoder_weights
from vllm_dfloat.plan.experts import Experts
from vllm_dfloat.plan.image_towers import gemma3_tower, llava_tower, mistral3_tower
from vllm_dfloat.plan.llama4_tower import llama4_tower
from vllm_dfloat.plan.qwen_towers import qwen2_5_vl_tower, qwen2_vl_tower, qwen3_vl_tower
from vllm_dfloat.plan.weights import Weight

GEMMA3_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
QWEN3 = Rules(o_bias="", has_qk_norm=True)
QWEN3_MOE = replace(QWEN3, has_all_ends=True, experts=Experts("moe_intermediate_size"))
DEEPSEEK_EXPERTS = Experts(
    "moe_intermediate_size",
    shared="shared_experts",
    shared_width=("moe_intermediate_size", "n_shared_experts"),
    first="first_k_dense_replace",
)
DEEPSEEK = Rules(is_latent=True, experts=DEEPSEEK_EXPERTS)
GLM4_MOE = Rules(
    o_bias="",
    has_qk_norm="use_qk_norm",
    experts=replace(DEEPSEEK_EXPERTS, router_itemsize=4, has_correction=True),
)
LLAMA4 = Rules(
    qkv_bias=False,
    o_bias="",
    mlp=("feed_forward", "intermediate_size_mlp"),
    experts=Experts(
        "intermediate_size",
        "feed_forward",
        is_stacked=True,
        router="router",
        shared="shared_expert",
        shared_width=("intermediate_size",),
    ),
)

RULES = {
    "LlamaForCausalLM": Rules(mlp_bias="mlp_bias"),
    "MistralForCausalLM": Rules(),
    "Qwen2ForCausalLM": Rules(qkv_bias=True, o_bias=""),
    "Qwen3ForCausalLM": QWEN3,
    "Phi3ForCausalLM": Rules(is_fused=True),
    "Gemma3ForCausalLM": Rules(
        has_qk_norm=True, norms=Rules.norms + GEMMA3_NORMS, has_all_ends=True
    ),
    "MixtralForCausalLM": Rules(
        qkv_bias=False,
        o_bias="",
        has_all_ends=True,
        experts=Experts("intermediate_size", "block_sparse_moe", ("w1", "w3", "w2")),
    ),
    "Qwen2MoeForCausalLM": Rules(
        qkv_bias=True,
        o_bias="",
        has_all_ends=True,
        experts=Experts(
            "moe_intermediate_size",
            shared="shared_expert",
            shared_width=("shared_expert_intermediate_size",),
            has_shared_gate=True,
        ),
    ),
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Llama4ForCausalLM": LLAMA4,
}


@dataclass(frozen=True)
class Multimodal:
    """A language model with a tower beside it.

    Attributes:
        tower: makes its weights, and those of the projector to the language model.
        text: the language model's architecture; "" if text_config tells it.
        is_stacked: whether experts are stacked in the checkpoint.
    """

    tower: Callable[[ModelConfig], Iterator[Weight]]
    text: str = ""
    is_stacked: bool = False


MULTIMODAL = {
    "Gemma3ForConditionalGeneration": Multimodal(gemma3_tower, "Gemma3ForCausalLM"),
    "Qwen2VLForConditionalGeneration": Multimodal(qwen2_vl_tower, "Qwen2ForCausalLM"),
    "Qwen2_5_VLForConditionalGeneration": Multimodal(qwen2_5_vl_tower, "Qwen2ForCausalLM"),
    "Qwen3VLForConditionalGeneration": Multimodal(qwen3_vl_tower, "Qwen3ForCausalLM"),
    "Qwen3VLMoeForConditionalGeneration": Multimodal(qwen3_vl_tower, "Qwen3MoeForCausalLM", True),
    "Llama4ForConditionalGeneration": Multimodal(llama4_tower, "Llama4ForCausalLM"),
    "LlavaForConditionalGeneration": Multimodal(llava_tower),
    "Mistral3ForConditionalGeneration": Multimodal(mistral3_tower),
}
TEXT_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
LANGUAGE_MODEL = "language_model."  # where vLLM puts it

# Prefixes in checkpoints -> vLLM's, as in its mappers of multimodal models; the first that fits counts.
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_model.", "vision_model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# Transformers 5 writes SigLIP and CLIP without the module around them.
_INNER_TOWER = re.compile(r"^vision_tower\.(embeddings|encoder|head|pre_layrnorm|post_layernorm)\b")


def is_known(architecture: str) -> bool:
    """Return whether the weights of an architecture can be told from its config."""
    return architecture in RULES or architecture in MULTIMODAL


def known_weights(config: ModelConfig) -> list[Weight]:
    """Return every weight of a model of a known architecture.

    Raises:
        UnsupportedError: another architecture.
        FormatError: the config lacks a size.
    """
    name = config.architecture
    if name in RULES:
        return decoder_weights(config, RULES[name])
    if name not in MULTIMODAL:
        raise UnsupportedError(
            f"{config.where}: architecture {name}; from a config alone plan knows "
            f"{', '.join(sorted(RULES | MULTIMODAL))}. Put the safetensors files beside the config."
        )
    kind = MULTIMODAL[name]
    rules = RULES[kind.text or _text_architecture(config)]
    if kind.is_stacked and rules.experts:
        rules = replace(rules, experts=replace(rules.experts, is_stacked=True))
    text = (_in_language_model(weight) for weight in decoder_weights(config, rules))
    return [*kind.tower(config), *text]


def _text_architecture(config: ModelConfig) -> str:
    model_type = config.text("model_type")
    if model_type not in TEXT_OF_TYPE:
        raise UnsupportedError(
            f"{config.where}: text_config has model_type {shown(model_type)}; with {config.architecture} plan "
            f"knows {', '.join(TEXT_OF_TYPE)}. Start vLLM to see what fits."
        )
    return TEXT_OF_TYPE[model_type]


def _in_language_model(weight: Weight) -> Weight:
    stored = {LANGUAGE_MODEL + name: shape for name, shape in weight.stored.items()}
    return replace(weight, name=LANGUAGE_MODEL + weight.name, stored=stored)


def name_in_vllm(name: str, config: ModelConfig) -> str:
    """Return what vLLM calls a tensor or module of a checkpoint, before it fuses any."""
    if config.architecture not in MULTIMODAL:
        return name
    old, new = next((pair for pair in _PREFIXES if name.startswith(pair[0])), ("", ""))
    return _INNER_TOWER.sub(r"vision_tower.vision_model.\1", new + name.removeprefix(old))
