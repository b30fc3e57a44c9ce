"""Families of models with states: which of their layers have one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.plan import family_states
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.states import State

FULL_INTERVAL = (
    4  # every fourth layer of Qwen3-Next is one of attention, unless its config says otherwise
)

# What a config calls the layers with a state, with keys and values, with both, and with neither.
_STATE = ("mamba", "linear_attention", "conv", "M")
_KEYS = ("attention", "full_attention", "*")
_BOTH = ("hybrid",)
_NEITHER = ("mlp", "moe", "-", "E")


@dataclass(frozen=True)
class Hybrid:
    """A family of models with states.

    Attributes:
        state: returns the state of a layer that has one.
        layers: returns a config's word for each layer; None if the family always has the same.
        all_layers: that word.
        has_rotary: whether its attention rotates.
    """

    state: Callable[[Sizes], State]
    layers: Callable[[Sizes, int], Sequence[object]] | None = None
    all_layers: str = ""
    has_rotary: bool = True

    def layers_with(self, text: Sizes, num_layers: int) -> tuple[tuple[bool, bool], ...]:
        """Return, for each layer, whether it has a state and whether it has keys and values.

        Raises:
            FormatError: the config has too few layers or words of another type.
            UnsupportedError: a kind of layer that is not known.
        """
        words = [self.all_layers] * num_layers
        if self.layers:
            words = [self._known(word, text.where) for word in self.layers(text, num_layers)]
        if len(words) < num_layers:
            raise FormatError(
                f"{text.where}: kinds of {len(words)} layers; expected {num_layers}, one per layer."
            )
        return tuple((word in _STATE + _BOTH, word in _KEYS + _BOTH) for word in words[:num_layers])

    @staticmethod
    def _known(word: object, where: str) -> str:
        known = _STATE + _KEYS + _BOTH + _NEITHER
        if not isinstance(word, str) or word not in known:
            raise UnsupportedError(
                f"{where}: a layer of kind {shown(word)}; with such a model plan knows {', '.join(known)}. "
                "Start vLLM to see what fits."
            )
        return word


def _kimi_layers(text: Sizes, num_layers: int) -> Sequence[object]:
    layers = text.part("linear_attn_config").integers("kda_layers")  # counted from 1
    return ["linear_attention" if i + 1 in layers else "attention" for i in range(num_layers)]


def _bailing_layers(text: Sizes, num_layers: int) -> Sequence[object]:
    every = text.size("layer_group_size", 1)
    whole = num_layers
    if text.count("short_conv_kernel_size"):
        whole = num_layers // every * every  # what is left over has attention
    return [
        "linear_attention" if (i + 1) % every and i < whole else "attention"
        for i in range(num_layers)
    ]


def _listed(text: Sizes, num_layers: int) -> Sequence[object]:
    """Return the words of a config's list, or string, of layers; without any, those of its intervals."""
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        words = text.entries.get(name)
        if isinstance(words, (list, str)) and words:
            return words
        if words is not None:
            raise FormatError(
                f"{text.where}: {name} is {shown(words)}; expected a list of names, one per layer."
            )
    if period := text.count("attn_layer_period"):
        offset = text.count("attn_layer_offset")
        return ["attention" if i % period == offset else "mamba" for i in range(num_layers)]
    if attention := text.integers("full_attn_idxs"):
        return ["attention" if i in attention else "conv" for i in range(num_layers)]
    every = text.size("full_attention_interval", FULL_INTERVAL)
    return ["mamba" if (i + 1) % every else "attention" for i in range(num_layers)]


_DELTA_NET = Hybrid(family_states.delta_net, _listed)
HYBRIDS: dict[str, Hybrid] = {
    "bailing_hybrid": Hybrid(family_states.bailing, _bailing_layers),
    "falcon_h1": Hybrid(family_states.falcon_h1, all_layers="hybrid"),
    "falcon_mamba": Hybrid(family_states.of_mamba, all_layers="mamba", has_rotary=False),
    "granitemoehybrid": Hybrid(family_states.granite, _listed),
    "jamba": Hybrid(family_states.jamba, _listed, has_rotary=False),
    "kimi_linear": Hybrid(family_states.kimi_linear, _kimi_layers, has_rotary=False),
    "lfm2": Hybrid(family_states.lfm2, _listed),
    "lfm2_moe": Hybrid(family_states.lfm2, _listed),
    "mamba": Hybrid(family_states.of_mamba, all_layers="mamba", has_rotary=False),
    "mamba2": Hybrid(family_states.of_mamba2, all_layers="mamba", has_rotary=False),
    "nemotron_h": Hybrid(family_states.nemotron_h, _listed, has_rotary=False),
    "olmo_hybrid": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": _DELTA_NET,
    "zamba2": Hybrid(family_states.zamba2, _listed),
}  # by model_type
