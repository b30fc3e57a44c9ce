"""Tiny random checkpoints of the architectures under test; std 0.02 as in real models, so that they compress."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VECTORS = Path(__file__).parent / "data" / "vectors"
SHIPPED = Path(__file__).parent.parent / "models" / "tiny"
SEED = 20240611
SHAPE: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=1536,  # gate_up_proj is over 1 MiB, where vLLM takes another GEMM on CPUs with AMX
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.02,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# name: (prefix of Transformers' config and model classes, differences from SHAPE)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False)),  # bias on q, k and v
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True, head_dim=64)),
    "phi3": ("Phi3", dict(tie_word_embeddings=False)),  # fused on disk
    "gemma3": (
        "Gemma3",
        dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=64, tie_word_embeddings=True),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, head_dim=64),
    ),
    "mistral": ("Mistral", dict(tie_word_embeddings=False, head_dim=64, sliding_window=None)),
}
# Architectures with tests of their own.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (  # latent attention; the first layer is dense, the second has experts
        "DeepseekV2",
        dict(
            tie_word_embeddings=False,
            num_key_value_heads=4,
            head_dim=64,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            q_lora_rank=None,
            n_routed_experts=4,
            n_shared_experts=2,
            moe_intermediate_size=128,
            first_k_dense_replace=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
        ),
    ),
    "phi": (
        "Phi",
        dict(tie_word_embeddings=False),
    ),  # biases everywhere, also in its LayerNorms and LM head
    "mamba2": (
        "Mamba2",
        dict(
            num_hidden_layers=1,
            vocab_size=64,
            state_size=16,
            intermediate_size=512,
            expand=2,
            head_dim=64,
            num_heads=8,
            n_groups=1,
        ),
    ),
}


def save(
    name: str, path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = SEED, **changes: Any
) -> Path:
    """Write a random checkpoint of architecture `name` into the folder `path`, and return it."""
    prefix, differences = {**ARCHITECTURES, **OTHERS}[name]
    config_class = getattr(transformers, f"{prefix}{'Text' * (name == 'gemma3')}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(
        config_class(**{**SHAPE, **differences, **changes})
    )
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.data.mean().item(), std=0.02)
    model.to(dtype).save_pretrained(path)
    return path


def gpt_oss(path: Path, seed: int) -> Path:
    """Write a random checkpoint of gpt-oss, whose experts have biases, into `path`, and return it."""
    torch.manual_seed(seed)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def official(name: str) -> Path:
    """Return the folder of an official checkpoint from the test vectors."""
    return VECTORS / f"{name}-df11"


def config_of(name: str) -> dict[str, Any]:
    """Return the model config of an official test vector; a single-file one has only `dfloat11_config`."""
    if name == "llama-tiny-single":
        return {**config_of("llama-tiny"), "num_hidden_layers": 1}
    config = json.loads((official(name) / "config.json").read_text())
    return {key: value for key, value in config.items() if key != "dfloat11_config"}


def save_decoded(name: str, path: Path) -> Path:
    """Write the official test vector `name` as a BF16 checkpoint into `path`."""
    from safetensors.torch import save_file

    from vllm_dfloat.checkpoint.reader import open_checkpoint
    from vllm_dfloat.checkpoint.shapes import model_shapes
    from vllm_dfloat.checkpoint.weights import weights

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config_of(name)))
    tensors = weights(open_checkpoint(official(name)), model_shapes(path))
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a BF16 checkpoint of one file."""
    from safetensors.torch import load

    return load((path / "model.safetensors").read_bytes())


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Let `change` edit the tensors of a BF16 checkpoint in place, and return its folder."""
    from safetensors.torch import load, save_file

    file = path / "model.safetensors"
    tensors = load(file.read_bytes())
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path
