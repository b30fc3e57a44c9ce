"""The model that the serving benchmark serves: an existing checkpoint, or random weights of a real model's shapes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STD = 0.02
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "initializer_range": STD,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "llama-3.1-405b": dict(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    ),
    "qwen3-30b-a3b-12": dict(  # 12 of its 48 transformer blocks, so that it fits beside its BF16 twin's KV cache
        QWEN3_MOE,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
    ),
    "qwen3-235b-a22b": dict(
        QWEN3_MOE,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
    ),
    "small": dict(  # large enough that a layer stands out from a process's own memory
        vocab_size=16384,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "small-experts": dict(  # as "small"
        QWEN3_MOE,
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=8,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "tiny-experts": dict(  # for rehearsals
        QWEN3_MOE,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
    ),
    "tiny": dict(  # for rehearsals
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
    ),
}


class BenchError(Exception):
    """Bad input, in one sentence for the person at the terminal."""


def tensor_shapes(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield, file by file, the names and shapes of the tensors of a Llama or Qwen3-MoE checkpoint."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    outer = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        outer["lm_head"] = (config["vocab_size"], hidden)
    yield {f"{name}.weight": shape for name, shape in outer.items()}
    block = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    num_experts = config.get("num_experts", 0)
    if num_experts:
        inter = config["moe_intermediate_size"]
        block["mlp.gate"] = (num_experts, hidden)
        block |= {f"self_attn.{part}_norm": (config["head_dim"],) for part in "qk"}
    for expert in [f".experts.{i}" for i in range(num_experts)] or [""]:
        block |= {f"mlp{expert}.{part}_proj": (inter, hidden) for part in ("gate", "up")}
        block[f"mlp{expert}.down_proj"] = (hidden, inter)
    for layer in range(config["num_hidden_layers"]):
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}


def num_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes of tensors of these shapes in BF16."""
    from math import prod

    return sum(2 * prod(shape) for shape in shapes.values())


def is_complete(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether `folder` holds exactly this checkpoint, completely written."""
    try:
        if json.loads((folder / "config.json").read_text()) != config:
            return False
        index = json.loads((folder / "model.safetensors.index.json").read_text())
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() for name in set(index["weight_map"].values()))


def write_random(shape: str, folder: Path) -> None:
    """Write random weights of the named shape into `folder`, unless they exist; config.json is written last.

    Holds one file at a time in memory. Uses the GPU if there is one.

    Raises:
        BenchError: the folder holds something else, or the disk is too small.
    """
    import torch
    from safetensors.torch import save_file

    config = {**LLAMA, **SHAPES[shape]}
    if is_complete(folder, config):
        return
    files = list(tensor_shapes(config))
    check_room(folder, sum(map(num_bytes, files)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    owners: dict[str, str] = {}
    for number, shapes in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {
            tensor: (
                torch.randn(size, device=device).mul_(STD) if len(size) > 1 else torch.ones(size)
            )
            .to(torch.bfloat16)
            .cpu()
            for tensor, size in shapes.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        owners |= dict.fromkeys(shapes, name)
    total = sum(map(num_bytes, files))
    index = {"metadata": {"total_size": total}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def check_room(folder: Path, needed: int) -> None:
    """Create `folder`; raise BenchError if it holds something else or its disk has fewer than `needed` bytes free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in folder.iterdir() if not p.name.startswith("model-0")]
    except OSError as error:
        raise BenchError(
            f"--folder {folder}: {error.strerror}; expected a folder to write the weights to. Name another."
        ) from error
    if foreign:
        raise BenchError(
            f"--folder {folder}: it holds {sorted(foreign)[0]} of something else; expected an empty folder or this "
            "model. Name another folder, or serve what is there with --model."
        )
    free = shutil.disk_usage(folder).free
    if free < 1.02 * needed:
        raise BenchError(
            f"--folder {folder}: {free / 1e9:.1f} GB free; the weights take {needed / 1e9:.1f} GB. "
            "Name a folder on a larger disk."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a BF16 checkpoint, or its text_config if it has one.

    Raises:
        BenchError: there is no config.json, or BF16 vLLM does not serve such a checkpoint.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        text = config.get("text_config") or config
    except (OSError, ValueError, AttributeError) as error:
        raise BenchError(
            f"--model: {path}: {error}; expected the config.json of a model. Give a local folder of a BF16 checkpoint."
        ) from error
    for key in ("quantization_config", "dfloat11_config"):
        if key in config:
            raise BenchError(
                f"--model: {path} has {key}; expected a BF16 checkpoint, which all variants can serve. "
                "Give the original of this model."
            )
    for key in ("vocab_size", "max_position_embeddings"):
        if not isinstance(text.get(key), int):
            raise BenchError(
                f"--model: {path}: {key} is {text.get(key)!r}; expected a number. Give a language model."
            )
    return dict(text)
