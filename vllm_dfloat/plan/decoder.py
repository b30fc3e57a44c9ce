"""The transformer blocks of a language model: the rules of an architecture, and the weights that follow from them."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_dfloat.plan.build import Spot, linear, mlp, norm, plain
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.experts import Experts, experts, is_sparse
from vllm_dfloat.plan.latent import latent_attention
from vllm_dfloat.plan.weights import Part, Place, Weight


@dataclass(frozen=True)
class Rules:
    """How an architecture differs from Llama.

    Attributes:
        qkv_bias: True, False, or the config's entry that says so.
        o_bias, mlp_bias: the config's entry that says so; "" for never.
        has_qk_norm: whether queries and keys are normed per head, or the config's entry that says so.
        norms: the norms of a transformer block.
        mlp: the module of an MLP without experts, and the entry with its width.
        is_fused: whether qkv_proj and gate_up_proj are one tensor each in the checkpoint.
        is_latent: whether attention is multi-head latent attention.
        has_all_ends: whether every pipeline stage holds embedding, last norm and LM head.
        experts: of a mixture of experts.
    """

    qkv_bias: bool | str = "attention_bias"
    o_bias: str = "attention_bias"
    mlp_bias: str = ""
    has_qk_norm: bool | str = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    mlp: tuple[str, str] = ("mlp", "intermediate_size")
    is_fused: bool = False
    is_latent: bool = False
    has_all_ends: bool = False
    experts: Experts | None = None


def decoder_weights(config: ModelConfig, rules: Rules) -> list[Weight]:
    """Return every weight of a language model.

    Raises:
        FormatError: the config lacks a size.
    """
    weights = list(_ends(config, rules))
    for layer in range(config.num_layers):
        weights += _layer(config, rules, layer)
    return weights


def _ends(config: ModelConfig, rules: Rules) -> Iterator[Weight]:
    """Yield embedding, last norm and LM head."""
    first: Place = "all" if rules.has_all_ends else "tied" if config.tied else "first"
    last: Place = "all" if rules.has_all_ends else "last"
    shape = config.vocab, config.hidden
    yield Weight(
        "model.embed_tokens", (Part(config.vocab),), config.hidden, "vocab", first,
        is_compressed=True, stored={"model.embed_tokens.weight": shape},
    )  # fmt: skip
    yield plain(Spot(place=last), "model.norm.weight", config.hidden)
    if not config.tied:
        yield Weight(
            "lm_head", (Part(config.vocab),), config.hidden, "vocab", last,
            is_compressed=True, stored={"lm_head.weight": shape},
        )  # fmt: skip


def _layer(config: ModelConfig, rules: Rules, layer: int) -> Iterator[Weight]:
    at, prefix = Spot(layer), f"model.layers.{layer}"
    if rules.is_latent:
        yield from latent_attention(config, at, f"{prefix}.self_attn")
    else:
        yield from _attention(config, rules, at, f"{prefix}.self_attn")
    if rules.experts and is_sparse(config, rules.experts, layer):
        yield from experts(config, rules.experts, at, prefix)
    else:
        module, width = rules.mlp
        yield from mlp(
            at, f"{prefix}.{module}", config.hidden, config.size(width),
            is_fused=rules.is_fused, bias=config.flag(rules.mlp_bias),
        )  # fmt: skip
    for name in rules.norms:
        yield from norm(at, f"{prefix}.{name}", config.hidden)


def _attention(config: ModelConfig, rules: Rules, at: Spot, prefix: str) -> Iterator[Weight]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    parts = Part(q, config.heads), Part(kv, config.kv_heads), Part(kv, config.kv_heads)
    tensors = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    if rules.is_fused:
        tensors = {"qkv_proj": q + 2 * kv}
    has_bias = rules.qkv_bias
    if isinstance(has_bias, str):
        has_bias = config.flag(has_bias)
    has_o_bias = config.flag(rules.o_bias)
    yield from linear(
        at, f"{prefix}.qkv_proj", parts, config.hidden, "rows", tensors=tensors, bias=has_bias
    )
    yield from linear(at, f"{prefix}.o_proj", Part(config.hidden), q, "cols", bias=has_o_bias)
    has_qk_norm = rules.has_qk_norm
    if isinstance(has_qk_norm, str):
        has_qk_norm = config.flag(has_qk_norm)
    if has_qk_norm:
        yield from norm(at, f"{prefix}.q_norm", config.head_dim)
        yield from norm(at, f"{prefix}.k_norm", config.head_dim)
