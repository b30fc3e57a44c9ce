"""Decide which tensors of a BF16 model form which DFloat11 units, from names, dtypes, shapes and the config.

A transformer block (a path up to its first number) is a unit. Each expert in it is a unit of its own, because all
experts of a layer can be more than a unit holds. Every weight outside of transformer blocks is a unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dfloat.checkpoint.names import natural, transformer_block
from vllm_dfloat.checkpoint.patterns import MAX_PATH
from vllm_dfloat.checkpoint.tied import is_lm_head, ties_embeddings
from vllm_dfloat.storage.stored_tensor import StoredTensor

WEIGHT = ".weight"

# The order in published releases, for transformer blocks with exactly these weights.
_PUBLISHED_ORDERS = (
    # FLUX.1
    ("norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj",
     "attn.add_v_proj", "attn.add_q_proj", "attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2",
     "ff_context.net.0.proj", "ff_context.net.2"),
    ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
)  # fmt: skip
# For all others: attention first, then by name, and within a module in this order. Published language models have it,
# also those with fused weights (Phi: o_proj before qkv_proj).
_LEAF_ORDER = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "qkv", "proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj",
)  # fmt: skip
# Architecture (or class, for diffusers) -> the only modules that its published releases compress.
_PUBLISHED_SCOPE = {
    "Gemma3ForConditionalGeneration": re.compile(
        r"(model\.)?language_model\.(model\.)?layers\.\d+\..*"
    ),
    "FluxTransformer2DModel": re.compile(r"(single_)?transformer_blocks\.\d+\..*"),
}
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "lm_head"}
# Classes without an LM head, such as BertModel, T5EncoderModel, Qwen3ForTokenClassification, but not GPT2LMHeadModel.
_HEADLESS = re.compile(
    r"(?!.*(LMHead|DoubleHeads|EncoderDecoder|Chat|GLM))"
    r".*(Model(With\w+)?|Encoder|For(\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)"
    r"|\w*(Embedding|Retrieval|Reward|Ranking|TextEncoding))\w*)"
)
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)


@dataclass(frozen=True)
class PlannedUnit:
    """Weights that will share one stream.

    Attributes:
        name: module path, such as "model.layers.0".
        members: attribute paths below it, in storage order; empty if the module itself is the weight.
        tensors: the tensor name of each.
    """

    name: str
    members: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class UnitPlan:
    """All units in the order of the model, and why other matrices are not compressed.

    Attributes:
        units: every unit.
        left: tensor name -> reason, for tensors of two or more dimensions that are in no unit.
    """

    units: tuple[PlannedUnit, ...]
    left: Mapping[str, str]


def plan_units(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> UnitPlan:
    """Return the units of a model.

    Args:
        config: its config.json.
        tensors: everything its files hold, by name.
    """
    tied = _is_tied(config, tensors)
    scope = _scope(config)
    left: dict[str, str] = {}
    grouped: dict[str, list[tuple[str, str]]] = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(WEIGHT)
        unit, member = _unit_of(path, is_fused=len(tensor.shape) == 3)
        reason = _reason_to_leave(name, tensor, tied, scope)
        if not reason and not unit:
            reason = "the module that it is of has no name, so a unit of it would have none"
        if not reason and len(path) > MAX_PATH:
            reason = f"its path has {len(path)} characters, more than the {MAX_PATH} that a reader matches"
        if reason:
            if len(tensor.shape) > 1:
                left[name] = reason
            continue
        grouped.setdefault(unit, []).append((member, name))
    for found in grouped.values():
        if len(found) > 1 and any(not member for member, _ in found):
            # With both, a reader could not tell to whom a unit of one weight belongs.
            alone = "it lies below a weight that is a unit by itself"
            left.update((name, alone) for member, name in found if member)
            found[:] = [(member, name) for member, name in found if not member]
    units = []
    for unit in sorted(grouped, key=natural):
        members = _in_order(dict(grouped[unit]))
        units.append(
            PlannedUnit(unit, tuple(m for m, _ in members if m), tuple(t for _, t in members))
        )
    return UnitPlan(tuple(units), left)


def is_expert(unit: str) -> bool:
    """Return whether a unit holds experts of a mixture only."""
    return bool(_EXPERTS.search(unit))


def _unit_of(path: str, is_fused: bool) -> tuple[str, str]:
    """Return the module path of the unit, and the attribute path below it, of a module or parameter.

    Args:
        path: name of the weight without the `weight` at its end.
        is_fused: it holds all experts of a layer; it shares a unit with those beside it.
    """
    parts = path.split(".")
    end = len(transformer_block(path).split("."))
    if not parts[end - 1].isdecimal():
        return path, ""
    if path.isdecimal():  # an item of a list that is the whole model (nn.Sequential)
        return path, ""
    if end == len(parts):  # an item of a list is itself the weight: `merger.mlp` holds 0 and 2
        return ".".join(parts[:-1]), parts[-1]
    for i in range(end, len(parts) - 2):
        if _EXPERTS.search(parts[i]) and parts[i + 1].isdecimal():
            end = i + 2
            break
    else:
        end = len(parts) - 1 if is_fused else end
    return ".".join(parts[:end]), ".".join(parts[end:])


def _reason_to_leave(
    name: str, tensor: StoredTensor, tied: bool, scope: re.Pattern[str] | None
) -> str:
    """Return why a tensor is in no unit, "" if it is in one."""
    dims = len(tensor.shape)
    path = name.removesuffix(WEIGHT)
    leaf = path.rpartition(".")[2]
    is_fused_expert = dims == 3 and bool(_EXPERTS.search(path))
    if dims < 2 or not (is_fused_expert or (dims == 2 and name.endswith(WEIGHT))):
        return "it is not the weight of a linear, embedding or expert layer"
    if tensor.dtype != "BF16":
        return f"it is {tensor.dtype}; the format holds BF16"
    if not tensor.num_bytes:
        return "it is empty"
    if leaf in _ROUTERS:
        return "it is a router, which need not be a linear layer"
    if tied and leaf in _EMBEDDINGS:
        return "it is embedding and output layer in one, which the format has no name for; vLLM holds it compressed"
    if scope and not scope.fullmatch(path):
        return "the published releases of this architecture leave it so"
    return ""


def _is_tied(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether the embedding is also the LM head. For classes without a head the config's entry means nothing."""
    classes = _classes(config)
    if classes and all(_HEADLESS.fullmatch(name) for name in classes):
        return False
    said = ties_embeddings(config)
    if said is not None:
        return said
    return not any(is_lm_head(name) and not name.endswith(".bias") for name in tensors)


def _scope(config: Mapping[str, Any]) -> re.Pattern[str] | None:
    known = (name for name in _classes(config) if name in _PUBLISHED_SCOPE)
    return next((_PUBLISHED_SCOPE[name] for name in known), None)


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes that the model is for."""
    architectures = config.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else []), config.get("_class_name")]
    return [name for name in names if isinstance(name, str)]


def _in_order(members: Mapping[str, str]) -> list[tuple[str, str]]:
    for published in _PUBLISHED_ORDERS:
        if set(published) == set(members):
            return [(member, members[member]) for member in published]
    return sorted(members.items(), key=lambda item: _order(item[0]))


def _order(member: str) -> tuple[Any, ...]:
    parent, _, leaf = member.rpartition(".")
    rank = _LEAF_ORDER.index(leaf) if leaf in _LEAF_ORDER else len(_LEAF_ORDER)
    is_attention = "attn" in parent or "attention" in parent
    return (not is_attention, natural(parent), rank, natural(leaf))


def build_patterns(units: Sequence[PlannedUnit], limit: int = 200) -> dict[str, list[str]]:
    """Return the `pattern_dict` of these units: regex -> attribute paths.

    Transformer blocks with the same weights share a pattern with `\\d+`. If some differ, their numbers are listed, in
    patterns of about `limit` characters, so that no unit matches two patterns.
    """
    templates: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = {}
    for unit in units:
        template = tuple("#" if part.isdecimal() else part for part in unit.name.split("."))
        templates.setdefault(template, {}).setdefault(unit.members, []).append(unit.name)
    found: dict[str, list[str]] = {}
    for template, lists in templates.items():
        for members, names in lists.items():
            if len(lists) == 1:
                keys = [r"\.".join(r"\d+" if part == "#" else re.escape(part) for part in template)]
            else:
                keys = _listed(names, limit)
            found.update((key, list(members)) for key in keys)
    return found


def _listed(names: Sequence[str], limit: int) -> list[str]:
    """Return patterns that match exactly these names, which differ only in numbers."""
    by_ends: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parts = name.split(".")
        last = max(i for i, part in enumerate(parts) if part.isdecimal())
        ends = ".".join([*parts[:last], ""]), ".".join(["", *parts[last + 1 :]])
        by_ends.setdefault(ends, []).append(parts[last])
    patterns = []
    for (head, tail), numbers in by_ends.items():
        chunk: list[str] = []
        for number in [*numbers, ""]:
            if chunk and (not number or len("|".join([*chunk, number])) > limit):
                patterns.append(f"{re.escape(head)}(?:{'|'.join(chunk)}){re.escape(tail)}")
                chunk = []
            chunk.append(number)
    return patterns
