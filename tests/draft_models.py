"""Draft models that agree with their target often enough to count: heads that copy what they read.

In every target here the embedding outweighs what the blocks add, so the next token is nearly a function of the last one
alone, and a head that passes the embedding of a token on predicts the next. One that reads other weights than its own,
or none, predicts nothing.
"""

import json
from pathlib import Path
from typing import Any

import architectures
import tiny_models
import torch
from safetensors.torch import save_file

SHAPE: dict[str, Any] = dict(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2, head_dim=64
)  # fmt: skip
OUTPUT = 16  # times what a DFlash block adds; a power of two too
WEIGHT = 16  # of the embedding; a power of two, so that it stays BF16 exactly

Tensors = dict[str, torch.Tensor]


def target(path: Path, kind: str = "llama", **config: Any) -> Path:
    """Write a target of three blocks; head_dim and the rest as in SHAPE."""
    tiny_models.save(kind, path, **{**SHAPE, "num_hidden_layers": 3, **config})
    return louder(path)


def louder(path: Path) -> Path:
    """Let the embedding outweigh the blocks, and return the folder."""

    def change(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"].mul_(WEIGHT)

    return tiny_models.edit(path, change)


def change_config(path: Path, **entries: Any) -> None:
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def head(path: Path) -> torch.Tensor:
    """Return what a target multiplies by at its end: its LM head, or the embedding that it is tied to."""
    tensors = tiny_models.tensors(path)
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])


def passes_on(rows: int, cols: int, weight: float = 1.0) -> torch.Tensor:
    """Return a matrix that passes on the first `rows` of `cols` values, and adds a little of all others."""
    noise = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols)) * 0.002
    noise[:, :rows] += weight * torch.eye(rows)
    return noise.bfloat16()


def near(weight: torch.Tensor, part: float = 0.5) -> torch.Tensor:
    """Return a matrix that is like `weight`, but is not it."""
    noise = (
        torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        * weight.float().std()
        * part
    )
    return (weight.float() + noise).bfloat16()  # fmt: skip


def eagle(of: Path, path: Path, own: str = "none") -> Path:
    """Write an EAGLE head for the target `of`, with an embedding of its `own`: "none", the "same", or one "near" it."""
    tiny_models.save("llama", path, seed=3, **SHAPE, num_hidden_layers=1)
    embedding = tiny_models.tensors(of)["model.embed_tokens.weight"]

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            weight = tensors.pop(name)
            if ".layers.0." in name and "input_layernorm" not in name:
                tensors[name.removeprefix("model.")] = weight
        tensors["fc.weight"] = passes_on(SHAPE["hidden_size"], 2 * SHAPE["hidden_size"])
        if own != "none":
            tensors["embed_tokens.weight"] = near(embedding) if own == "near" else embedding

    return tiny_models.edit(path, change)


def eagle3(of: Path, path: Path, own: str = "none", vocabulary: int = SHAPE["vocab_size"]) -> Path:
    """Write an EAGLE-3 head, whose block attends to its own position and passes its embedding on.

    Its LM head is the target's, of the first `vocabulary` tokens.
    """
    tiny_models.save("llama", path, seed=3, **SHAPE, num_hidden_layers=1)
    change_config(
        path,
        architectures=["LlamaForCausalLMEagle3"],
        draft_vocab_size=vocabulary,
        eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    )
    width = SHAPE["hidden_size"]
    embedding = tiny_models.tensors(of)["model.embed_tokens.weight"]

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            weight = tensors.pop(name)
            if ".layers.0." in name:
                tensors[name.replace("model.layers.0.", "midlayer.")] = weight
        tensors["midlayer.hidden_norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        for name, weight in (("q", 2.0), ("k", 2.0), ("v", 1.0)):
            tensors[f"midlayer.self_attn.{name}_proj.weight"] = passes_on(width, 2 * width, weight)
        tensors["midlayer.self_attn.o_proj.weight"] = passes_on(width, width)
        tensors["norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        tensors["fc.weight"] = passes_on(width, 3 * width, 0.01)
        tensors["lm_head.weight"] = head(of)[:vocabulary].clone()
        if vocabulary != SHAPE["vocab_size"]:
            tensors["d2t"] = torch.zeros(vocabulary, dtype=torch.int64)
        if own != "none":
            tensors["embed_tokens.weight"] = near(embedding) if own == "near" else embedding

    return tiny_models.edit(path, change)


def medusa(of: Path, path: Path, num_heads: int = 3) -> Path:
    """Write Medusa heads for the target `of`; each knows which token follows a token after some more steps."""
    tensors = tiny_models.tensors(of)
    embedding = torch.nn.functional.normalize(tensors["model.embed_tokens.weight"].float(), dim=-1)
    follower = (embedding @ head(of).float().T).argmax(-1)
    weights, later = {}, follower
    for i in range(num_heads):
        later = follower[later]
        lm_head = torch.zeros_like(embedding).index_add(0, later, embedding)
        weights[f"blocks.{i}.layers.0.weight"] = passes_on(*2 * (SHAPE["hidden_size"],), 0.01)
        weights[f"lm_heads.{i}.weight"] = lm_head.bfloat16()
    config = dict(
        architectures=["MedusaModel"], model_type="medusa", hidden_size=SHAPE["hidden_size"],
        vocab_size=SHAPE["vocab_size"], medusa_num_heads=num_heads, medusa_num_layers=1, torch_dtype="bfloat16",
    )  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def followed_by_few(of: Path) -> Path:
    """Let a few tokens follow nearly every other, and return the folder of the target."""

    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"][7:15:2] *= 8

    return tiny_models.edit(of, change)


def dflash(of: Path, path: Path) -> Path:
    """Write a DFlash head, which fills in masked tokens at once; its block reads what the target cached for it.

    The embedding and the LM head are the target's. How many tokens are accepted depends on every weight of the block.
    """
    tiny_models.save("qwen3", path, seed=3, **SHAPE, num_hidden_layers=1, tie_word_embeddings=False)
    change_config(
        path, architectures=["DFlashDraftModel"], block_size=4,
        dflash_config={"target_layer_ids": [0, 1], "mask_token_id": 100},
    )  # fmt: skip
    width = SHAPE["hidden_size"]

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            weight = tensors.pop(name)
            if ".layers.0." in name:
                is_output = "o_proj" in name or "down_proj" in name
                tensors[name.removeprefix("model.")] = weight * (OUTPUT if is_output else 1)
        tensors["fc.weight"] = passes_on(width, 2 * width)
        for name in ("norm", "hidden_norm"):
            tensors[f"{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)

    return tiny_models.edit(path, change)


# How families name what lies around the block that predicts a further token: the norm of the embedding, that of the
# hidden state, the projection of both, the last norm; and the block.
AROUND = {
    "DeepSeek": ("{at}.enorm", "{at}.hnorm", "{at}.eh_proj", "{at}.shared_head.norm", "{at}"),
    "Ernie": ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0", "", "model.mtp_block.0"),
    "Qwen": ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm", "mtp.layers.0"),
}  # fmt: skip
WITH_MTP: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV3ForCausalLM": ("DeepSeek", {}),
    "Ernie4_5_MoeForCausalLM": ("Ernie", {}),
    "ExaoneMoeForCausalLM": ("Qwen", dict(mlp_layer_types=["dense", "sparse", "dense"])),
    "Glm4MoeForCausalLM": ("DeepSeek", {}),
    "Glm4MoeLiteForCausalLM": ("DeepSeek", {}),
    "Qwen3NextForCausalLM": ("Qwen", dict(layer_types=["linear_attention", *2 * ["full_attention"]])),
}  # fmt: skip


def with_mtp(name: str, path: Path) -> Path:
    """Write a model of the table of architectures with one more block, which predicts a further token."""
    family, differences = WITH_MTP[name]
    shape = {
        **architectures.SHAPE,
        **architectures.CASES[name],
        "num_hidden_layers": 3,
        **differences,
    }
    architectures.save(name, path, shape)
    louder(path)
    config = json.loads((path / "config.json").read_text())
    kinds = {key: config[key][:2] for key in ("layer_types", "mlp_layer_types") if config.get(key)}
    change_config(path, num_hidden_layers=2, num_nextn_predict_layers=1, **kinds)
    width, last = shape["hidden_size"], "model.layers.2"
    dense = (
        architectures.save("LlamaForCausalLM", path.parent / f"{path.name}-dense", shape)
        if family == "Ernie"
        else None
    )

    def change(tensors: Tensors) -> None:
        of_embedding, of_hidden, projection, of_result, block = (
            n.format(at=last) for n in AROUND[family]
        )
        moved = {n: tensors.pop(n) for n in list(tensors) if n.startswith(f"{last}.")}
        if dense:
            moved = {
                n: t for n, t in tiny_models.tensors(dense).items() if n.startswith(f"{last}.")
            }
        tensors.update({n.replace(last, block): weight for n, weight in moved.items()})
        one = 0 if name.startswith("Qwen3Next") else 1  # whose norms add it
        for norm in filter(None, (of_embedding, of_hidden, of_result)):
            tensors[f"{norm}.weight"] = torch.full((width,), one, dtype=torch.bfloat16)
        tensors[f"{projection}.weight"] = passes_on(width, 2 * width)

    return tiny_models.edit(path, change)
