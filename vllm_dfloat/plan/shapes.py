"""The weights of a model from its config alone, for the architectures whose rules are known here."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.weights import Part, Place, Split, Weight


@dataclass(frozen=True)
class Rules:
    """What tells an architecture from Llama.

    Attributes:
        qkv_bias: True, False, or the config's entry that says so.
        o_bias, mlp_bias: the config's entries that say so; "" for never.
        has_qk_norm: whether queries and keys are normed per head.
        norms: the norms of a block.
        is_fused: whether qkv_proj and gate_up_proj are one tensor each in the checkpoint.
        has_all_ends: whether every pipeline stage holds embedding, last norm and LM head.
        is_embedding_compressed: False where vLLM gives the embedding no quantization method.
        experts: of a mixture of experts.
    """

    qkv_bias: bool | str = "attention_bias"
    o_bias: str = "attention_bias"
    mlp_bias: str = ""
    has_qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    is_fused: bool = False
    has_all_ends: bool = False
    is_embedding_compressed: bool = True
    experts: "Experts | None" = None


@dataclass(frozen=True)
class Experts:
    """How an architecture lays out its mixture of experts.

    Attributes:
        width: how the config calls the width of an expert.
        block: the module that holds them, and the names of its tensors.
        has_shared: whether there is an expert for every token beside them.
    """

    width: str
    block: str
    tensors: tuple[str, str, str]
    has_shared: bool = False


QWEN_EXPERTS = (
    "moe_intermediate_size",
    "mlp",
    ("gate_proj", "up_proj", "down_proj"),
)
GEMMA3_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")

RULES = {
    "LlamaForCausalLM": Rules(mlp_bias="mlp_bias"),
    "MistralForCausalLM": Rules(),
    "Qwen2ForCausalLM": Rules(qkv_bias=True, o_bias=""),
    "Qwen3ForCausalLM": Rules(o_bias="", has_qk_norm=True),
    "Phi3ForCausalLM": Rules(is_fused=True),
    "Gemma3ForCausalLM": Rules(
        has_qk_norm=True, norms=Rules.norms + GEMMA3_NORMS, has_all_ends=True
    ),
    "MixtralForCausalLM": Rules(
        qkv_bias=False,
        o_bias="",
        has_all_ends=True,
        is_embedding_compressed=False,
        experts=Experts("intermediate_size", "block_sparse_moe", ("w1", "w3", "w2")),
    ),
    "Qwen2MoeForCausalLM": Rules(
        qkv_bias=True, o_bias="", has_all_ends=True, experts=Experts(*QWEN_EXPERTS, True)
    ),
    "Qwen3MoeForCausalLM": Rules(
        o_bias="", has_qk_norm=True, has_all_ends=True, experts=Experts(*QWEN_EXPERTS)
    ),
}


def known_weights(config: ModelConfig) -> list[Weight]:
    """Return every weight of a model of a known architecture.

    Raises:
        UnsupportedError: another architecture.
        FormatError: the config lacks a size.
    """
    rules = RULES.get(config.architecture)
    if rules is None:
        raise UnsupportedError(
            f"{config.where}: architecture {config.architecture}; from a config alone plan knows "
            f"{', '.join(sorted(RULES))}. Put the safetensors files beside the config."
        )
    weights = list(_ends(config, rules))
    for layer in range(config.num_layers):
        weights += _block(config, rules, layer)
    return weights


def _ends(config: ModelConfig, rules: Rules) -> Iterator[Weight]:
    """Yield embedding, last norm and LM head."""
    first: Place = "all" if rules.has_all_ends else "tied" if config.tied else "first"
    last: Place = "all" if rules.has_all_ends else "last"
    shape = config.vocab, config.hidden
    yield Weight(
        "model.embed_tokens", (Part(config.vocab),), config.hidden, "vocab", first,
        is_compressed=rules.is_embedding_compressed, stored={"model.embed_tokens.weight": shape},
    )  # fmt: skip
    stored = {"model.norm.weight": (config.hidden,)}
    yield Weight("model.norm", (Part(config.hidden),), place=last, stored=stored)
    if not config.tied:
        yield Weight(
            "lm_head", (Part(config.vocab),), config.hidden, "vocab", last,
            is_compressed=True, stored={"lm_head.weight": shape},
        )  # fmt: skip


def _block(config: ModelConfig, rules: Rules, layer: int) -> Iterator[Weight]:
    prefix = f"model.layers.{layer}"
    yield from _attention(config, rules, f"{prefix}.self_attn", layer)
    if rules.experts and _is_sparse(config, layer):
        yield from _experts(config, rules.experts, prefix, layer)
    else:
        bias = bool(config.entries.get(rules.mlp_bias))
        width = config.size("intermediate_size")
        yield from _mlp(config, f"{prefix}.mlp", layer, width, rules.is_fused, bias)
    for norm in rules.norms:
        yield _vector(f"{prefix}.{norm}", config.hidden, layer)


def _is_sparse(config: ModelConfig, layer: int) -> bool:
    step = config.size("decoder_sparse_step", 1)
    return layer not in (config.entries.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _attention(config: ModelConfig, rules: Rules, prefix: str, layer: int) -> Iterator[Weight]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    parts = Part(q, config.heads), Part(kv, config.kv_heads), Part(kv, config.kv_heads)
    names = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    if rules.is_fused:
        names = {"qkv_proj": q + 2 * kv}
    has_bias = rules.qkv_bias
    if isinstance(has_bias, str):
        has_bias = bool(config.entries.get(has_bias))
    has_o_bias = bool(config.entries.get(rules.o_bias))
    yield from _linear(f"{prefix}.qkv_proj", parts, config.hidden, "rows", layer, names, has_bias)
    yield from _linear(
        f"{prefix}.o_proj", (Part(config.hidden),), q, "cols", layer, bias=has_o_bias
    )
    if rules.has_qk_norm:
        yield _vector(f"{prefix}.q_norm", config.head_dim, layer)
        yield _vector(f"{prefix}.k_norm", config.head_dim, layer)


def _mlp(
    config: ModelConfig,
    prefix: str,
    layer: int,
    width: int,
    fused: bool = False,
    bias: bool = False,
) -> Iterator[Weight]:
    names = {"gate_up_proj": 2 * width} if fused else {"gate_proj": width, "up_proj": width}
    parts = Part(width), Part(width)
    yield from _linear(f"{prefix}.gate_up_proj", parts, config.hidden, "rows", layer, names, bias)
    yield from _linear(
        f"{prefix}.down_proj", (Part(config.hidden),), width, "cols", layer, bias=bias
    )


def _experts(config: ModelConfig, kind: Experts, prefix: str, layer: int) -> Iterator[Weight]:
    """Yield a mixture of experts: the experts themselves and what routes to them stay BF16."""
    # Transformers writes either name, whatever the architecture.
    named = "num_experts" if config.entries.get("num_experts") else "num_local_experts"
    count, width, hidden = config.size(named), config.size(kind.width), config.hidden
    block = f"{prefix}.{kind.block}"
    gate, up, down = kind.tensors
    stored = {
        f"{block}.experts.{i}.{n}.weight": (width, hidden) for i in range(count) for n in (gate, up)
    }
    yield Weight(
        f"{block}.experts.w13_weight", (Part(width), Part(width)), count * hidden, "rows",
        layer=layer, stored=stored,
    )  # fmt: skip
    stored = {f"{block}.experts.{i}.{down}.weight": (hidden, width) for i in range(count)}
    yield Weight(
        f"{block}.experts.w2_weight",
        (Part(width),),
        count * hidden,
        "rows",
        layer=layer,
        stored=stored,
    )
    routers = {"gate": count, **({"shared_expert_gate": 1} if kind.has_shared else {})}
    for name, rows in routers.items():
        stored = {f"{block}.{name}.weight": (rows, hidden)}
        yield Weight(f"{block}.{name}", (Part(rows),), hidden, layer=layer, stored=stored)
    if kind.has_shared:
        shared = config.size("shared_expert_intermediate_size")
        yield from _mlp(config, f"{block}.shared_expert", layer, shared)


def _linear(
    name: str,
    parts: tuple[Part, ...],
    cols: int,
    split: Split,
    layer: int,
    names: dict[str, int] | None = None,
    bias: bool = False,
) -> Iterator[Weight]:
    """Yield a linear layer and its bias; `names` are its tensors in the checkpoint and their rows."""
    block, _, own = name.rpartition(".")
    stored: dict[str, tuple[int, ...]]
    rows = names or {own: sum(part.rows for part in parts)}
    stored = {f"{block}.{n}.weight": (count, cols) for n, count in rows.items()}
    yield Weight(name, parts, cols, split, layer=layer, is_compressed=True, stored=stored)
    if bias:  # each rank holds the biases of its rows
        stored = {f"{block}.{n}.bias": (count,) for n, count in rows.items()}
        cut: Split = "rows" if split == "rows" else "none"
        yield Weight(f"{name}.bias", parts, 1, cut, layer=layer, stored=stored)


def _vector(name: str, length: int, layer: int) -> Weight:
    return Weight(name, (Part(length),), layer=layer, stored={f"{name}.weight": (length,)})
