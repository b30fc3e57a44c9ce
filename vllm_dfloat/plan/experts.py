"""A mixture of experts: how many, where, and the layers beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_dfloat.plan.build import Spot, mlp, plain
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.weights import Part, Weight

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as the families call it
STEPS = ("decoder_sparse_step", "interleave_moe_layer_step")


@dataclass(frozen=True)
class Experts:
    """How an architecture lays out its mixture of experts.

    Attributes:
        width: the entry with the width of an expert.
        module: the module that holds them, and `tensors` the names of an expert's gate, up and down in the checkpoint.
        is_stacked: all experts are one tensor gate_up_proj [E, hidden, 2 * width] and one down_proj [E, width, hidden].
        router: the module that chooses experts.
        shared: the module that every token passes; its width is the product of the entries `shared_width`.
        has_shared_gate: whether a linear layer of one row scales the shared expert.
        router_itemsize: bytes per weight of the router; GLM's is float32.
        first: the entry with the number of the first blocks, which have no experts.
        has_correction: whether a bias corrects the router's choice; DeepSeek's config says so instead.
    """

    width: str
    module: str = "mlp"
    tensors: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    is_stacked: bool = False
    router: str = "gate"
    shared: str = ""
    shared_width: tuple[str, ...] = ()
    has_shared_gate: bool = False
    router_itemsize: int = 2
    has_correction: bool = False
    first: str = ""


def is_sparse(config: ModelConfig, kind: Experts, layer: int) -> bool:
    """Return whether a transformer block has experts: some models have them in some blocks only."""
    if layer in config.integers("mlp_only_layers"):
        return False
    if kind.first and layer < config.count(kind.first):
        return False
    steps = [config.count(name) for name in STEPS]
    if any((layer + 1) % step for step in steps if step):
        return False
    return layer % config.size("moe_layer_freq", 1) == 0


def experts(config: ModelConfig, kind: Experts, at: Spot, prefix: str) -> Iterator[Weight]:
    """Yield the experts of a transformer block, their router, and the shared experts."""
    # Transformers may write any of these names for any architecture.
    named = next((name for name in COUNTS if config.count(name)), COUNTS[0])
    count, width, hidden = config.size(named), config.size(kind.width), config.hidden
    module = f"{prefix}.{kind.module}"
    first, second = _stored(kind, module, count, width, hidden)
    yield Weight(
        f"{module}.experts.w13_weight", (Part(width), Part(width)), count * hidden, "rows",
        layer=at.layer, is_compressed=True, stored=first, num_experts=count,
    )  # fmt: skip
    yield Weight(
        f"{module}.experts.w2_weight", (Part(width),), count * hidden, "rows",
        layer=at.layer, is_compressed=True, stored=second, num_experts=count,
    )  # fmt: skip
    yield plain(at, f"{module}.{kind.router}.weight", count, hidden, itemsize=kind.router_itemsize)
    if kind.has_correction or config.text("topk_method") == "noaux_tc":
        yield plain(at, f"{module}.{kind.router}.e_score_correction_bias", count, itemsize=4)
    if kind.has_shared_gate:
        yield plain(at, f"{module}.shared_expert_gate.weight", 1, hidden)
    if kind.shared and all(config.count(name) for name in kind.shared_width):
        shared = 1
        for name in kind.shared_width:
            shared *= config.size(name)
        yield from mlp(at, f"{module}.{kind.shared}", hidden, shared)


def _stored(
    kind: Experts, module: str, count: int, width: int, hidden: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the tensors of the checkpoint that w13 and w2 are fused from, with their shapes."""
    if kind.is_stacked:
        return (
            {f"{module}.experts.gate_up_proj": (count, hidden, 2 * width)},
            {f"{module}.experts.down_proj": (count, width, hidden)},
        )
    gate, up, down = kind.tensors
    first: dict[str, tuple[int, ...]] = {}
    second: dict[str, tuple[int, ...]] = {}
    for i in range(count):
        for name in (gate, up):
            first[f"{module}.experts.{i}.{name}.weight"] = width, hidden
        second[f"{module}.experts.{i}.{down}.weight"] = hidden, width
    return first, second
