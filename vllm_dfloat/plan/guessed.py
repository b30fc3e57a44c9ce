"""The weights of an architecture without rules, guessed from the tensors of its files."""

import math
import re
from collections import defaultdict

from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.stored import DTYPES, HEAD, Files
from vllm_dfloat.plan.weights import Part, Place, Split, Weight

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_STAYS_BF16 = re.compile(
    r"(?:^|\.)(?:gate|router|router\.layer|embed_positions|wpe|position_embedding)\.weight$"
    r"|\.(?:mlp|self_attention\.experts)\.(?:input|output)_linear\."  # JetMoe's experts, of Transformers
)
_EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.(?:input|output)_linear\.")  # Granite's
_ONE_EXPERT = re.compile(
    r"(?P<module>.*\.experts)\.(?P<number>\d+)\.(?:gate_proj|up_proj|w1|w3|(?P<down>down_proj|w2))\.weight"
)
_TOWER = re.compile(r"vis|audio|speech")


def weights_of_files(files: Files, config: ModelConfig) -> list[Weight]:
    """Return the weights of an architecture without rules, which vLLM may treat differently.

    Every matrix is cut evenly over the ranks, by rows. Every matrix is compressed but those of routers, embeddings of
    positions that are torch's own, experts that are no layers of vLLM's, and what latent attention reads. Experts in
    tensors of their own are one tensor, as in vLLM.
    """
    weights, experts = [], defaultdict[str, list[str]](list)
    for name, tensor in files.tensors.items():
        if name == HEAD and config.tied:
            continue
        if (
            (one := _ONE_EXPERT.fullmatch(name))
            and tensor.dtype in DTYPES
            and len(tensor.shape) == 2
        ):
            experts[one["module"] + (".w2_weight" if one["down"] else ".w13_weight")].append(name)
            continue
        rows, cols = _as_matrix(tensor.shape)
        found = _LAYER.search(name)
        layer = int(found.group(1)) if found else -1
        is_stack = len(tensor.shape) == 3 and bool(_EXPERTS.search(name))
        is_matrix = is_stack or (len(tensor.shape) == 2 and name.endswith(".weight"))
        is_matrix = is_matrix and tensor.dtype in DTYPES
        is_vocab = rows == config.vocab and layer < 0
        stays_bf16 = bool(_STAYS_BF16.search(name)) or bool(config.latent and "kv_b_proj" in name)
        is_cut = (is_matrix and not stays_bf16) or is_stack or "expert" in name
        split: Split = "vocab" if is_vocab else "rows" if is_cut else "none"
        itemsize = 2 if tensor.dtype in DTYPES else tensor.num_bytes // max(1, rows * cols)
        weights.append(
            Weight(
                name.removesuffix(".weight"), (Part(rows),), cols, split, _place(name, layer, config), layer,
                is_matrix and not stays_bf16, {name: tensor.shape}, itemsize,
            )
        )  # fmt: skip
    return weights + [_fused(name, stored, files, config) for name, stored in experts.items()]


def _fused(name: str, stored: list[str], files: Files, config: ModelConfig) -> Weight:
    """Return the tensor that vLLM makes of those of all experts: their rows, or columns, that ranks cut."""
    shapes = {tensor: files.tensors[tensor].shape for tensor in stored}
    cut, other = shapes[stored[0]][:: -1 if name.endswith(".w2_weight") else 1]
    count = len({_ONE_EXPERT.sub(r"\g<number>", tensor) for tensor in stored})
    layer = int(found.group(1)) if (found := _LAYER.search(name)) else -1
    return Weight(
        name, (Part(cut),) * (len(stored) // count), count * other, "rows", _place(name, layer, config), layer,
        is_compressed=True, stored=shapes, num_experts=count,
    )  # fmt: skip


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [rows, cols], for a 3-D tensor with its experts side by side, so that each of them is cut."""
    if len(shape) == 3:
        return shape[1], shape[0] * shape[2]
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def _place(name: str, layer: int, config: ModelConfig) -> Place:
    if 0 <= layer < config.num_layers and not _TOWER.search(name):
        return "layer"
    if "embed_tokens" in name:
        return "tied" if config.tied else "first"
    return "last" if name in (HEAD, "model.norm.weight") else "all"
