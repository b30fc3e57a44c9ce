"""Tiny random checkpoints of architectures whose embedding or LM head vLLM builds without a quantization config."""

import json
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers

SHAPE: dict[str, Any] = dict(
    vocab_size=250,  # vLLM pads it to 256
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.02,
)
SSM = dict(state_size=32, num_heads=8, head_dim=32, n_groups=1, expand=2)
MAMBA_PART = dict(mamba_d_ssm=256, mamba_n_heads=8, mamba_d_head=32, mamba_d_state=32, mamba_n_groups=1)  # fmt: skip
MOE = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, moe_intermediate_size=128,
)  # fmt: skip

# name: (prefix of Transformers' classes, differences from SHAPE, names of the embedding and of an own LM head in vLLM)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gemma": ("Gemma", dict(head_dim=64), ("model.embed_tokens",)),
    "gemma2": ("Gemma2", dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=64), ("model.embed_tokens",)),
    "cohere": ("Cohere", {}, ("model.embed_tokens",)),
    "falcon": ("Falcon", dict(ffn_hidden_size=512), ("transformer.word_embeddings",)),
    "falcon untied": (
        "Falcon",
        dict(ffn_hidden_size=512, tie_word_embeddings=False),
        ("transformer.word_embeddings", "lm_head"),
    ),
    "bloom": ("Bloom", dict(n_layer=2, n_head=2), ("transformer.word_embeddings",)),
    "opt": ("OPT", dict(ffn_dim=256, word_embed_proj_dim=64), ("model.decoder.embed_tokens",)),
    "nemotron": ("Nemotron", {}, ("model.embed_tokens", "lm_head")),
    "mixtral": ("Mixtral", dict(num_local_experts=4), ("model.embed_tokens", "lm_head")),
    "glm4 moe": (
        "Glm4Moe",
        dict(head_dim=64, tie_word_embeddings=False, **MOE),
        ("model.embed_tokens", "lm_head"),
    ),
    "gpt-oss": (
        "GptOss",
        dict(head_dim=64, num_local_experts=4, sliding_window=64),
        ("model.embedding", "lm_head"),
    ),
    "mamba2": ("Mamba2", dict(tie_word_embeddings=True, **SSM), ("backbone.embeddings",)),
    "falcon h1": ("FalconH1", MAMBA_PART, ("model.embed_tokens", "lm_head")),
    "minicpm": ("Llama", dict(tie_word_embeddings=False), ("model.embed_tokens", "lm_head")),
    "internlm2": ("Llama", dict(tie_word_embeddings=False), ("model.tok_embeddings", "output")),
}  # fmt: skip
# Architectures that Transformers does not have: what their config.json says beside Llama's.
OTHERS: dict[str, dict[str, Any]] = {
    "minicpm": dict(
        architectures=["MiniCPMForCausalLM"], scale_emb=12, dim_model_base=64, scale_depth=1.4
    ),
    "internlm2": dict(architectures=["InternLM2ForCausalLM"], bias=False),
}


def save(name: str, path: Path, seed: int = tiny_models.SEED) -> Path:
    """Write the checkpoint of a model and return its folder."""
    kind, differences, _ = MODELS[name]
    given = {**SHAPE, **differences}
    if kind == "OPT":
        del given["intermediate_size"]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**given)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.02)
    model.bfloat16().save_pretrained(path)
    if name in OTHERS:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | OTHERS[name]))
    if name == "internlm2":
        tiny_models.edit(path, _rename_as_internlm2)
    return path


def _rename_as_internlm2(tensors: dict[str, torch.Tensor]) -> None:
    new = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name in list(tensors):
        renamed = name
        for old, instead in new.items():
            renamed = renamed.replace(old, instead)
        tensors[renamed] = tensors.pop(name)
    for layer in range(SHAPE["num_hidden_layers"]):
        qkv = [tensors.pop(f"model.layers.{layer}.self_attn.{kind}_proj.weight") for kind in "qkv"]
        tensors[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(qkv)
