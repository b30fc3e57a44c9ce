"""Families of models with states: which layers have one, and how large it is, from the entries of their configs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.states import ITEMSIZE, STATE_DTYPES, State

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


def _mamba2(text: Sizes, inner: int, heads: str, names: tuple[str, str, str, str]) -> State:
    """Return the state of a Mamba-2 layer; names: of the entries for groups, head dim, state and convolution."""
    groups, head_dim, width, kernel = (text.size(name) for name in names)
    numbers = text.size(heads) * head_dim * width
    return State(inner, kernel - 1, groups, 2 * width, numbers)


_NAMES = ("mamba_n_groups", "mamba_d_head", "mamba_d_state", "mamba_d_conv")


def _falcon_h1(text: Sizes) -> State:
    inner = text.count("mamba_d_ssm") or text.size("mamba_expand", 2) * text.size("hidden_size")
    return _mamba2(text, inner, "mamba_n_heads", _NAMES)


def _granite(text: Sizes) -> State:
    return _expanded(text, "mamba_n_groups")


def _zamba2(text: Sizes) -> State:
    return _expanded(text, "mamba_ngroups")


def _expanded(text: Sizes, groups: str) -> State:
    """Return the state of a Mamba-2 layer whose heads make up its whole width."""
    inner, width = (
        text.size("mamba_expand", 2) * text.size("hidden_size"),
        text.size("mamba_d_state"),
    )
    return State(
        inner, text.size("mamba_d_conv") - 1, text.size(groups, 1), 2 * width, inner * width
    )


def _nemotron_h(text: Sizes) -> State:
    heads, head_dim = text.size("mamba_num_heads"), text.size("mamba_head_dim")
    width = text.size("ssm_state_size")
    dtype = text.text("mamba_ssm_cache_dtype", "float32")
    return State(
        heads * head_dim, text.size("conv_kernel") - 1, text.size("n_groups"), 2 * width, heads * head_dim * width,
        STATE_DTYPES.get(dtype) or ITEMSIZE,
    )  # fmt: skip


def _of_mamba2(text: Sizes) -> State:
    inner = text.size("expand", 2) * text.size("hidden_size")
    return _mamba2(text, inner, "num_heads", ("n_groups", "head_dim", "state_size", "conv_kernel"))


def _of_mamba(text: Sizes) -> State:
    inner = text.size("intermediate_size", text.size("expand", 2) * text.size("hidden_size"))
    return State(
        inner, text.size("conv_kernel", 4) - 1, numbers=inner * text.size("state_size", 16)
    )


def _jamba(text: Sizes) -> State:
    inner = text.size("mamba_expand", 2) * text.size("hidden_size")
    return State(
        inner, text.size("mamba_d_conv", 4) - 1, numbers=inner * text.size("mamba_d_state", 16)
    )


def _lfm2(text: Sizes) -> State:
    return State(text.size("conv_dim", text.size("hidden_size")), text.size("conv_L_cache") - 1)


def _delta_net(text: Sizes) -> State:
    keys = text.size("linear_num_key_heads") * text.size("linear_key_head_dim")
    values = text.size("linear_num_value_heads") * text.size("linear_value_head_dim")
    dtype = text.text("mamba_ssm_dtype")
    return State(
        2 * keys + values, text.size("linear_conv_kernel_dim", 4) - 1,
        numbers=values * text.size("linear_key_head_dim"), itemsize=STATE_DTYPES.get(dtype) or ITEMSIZE,
    )  # fmt: skip


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


_DELTA_NET = Hybrid(_delta_net, _listed)
HYBRIDS: dict[str, Hybrid] = {
    "falcon_h1": Hybrid(_falcon_h1, all_layers="hybrid"),
    "falcon_mamba": Hybrid(_of_mamba, all_layers="mamba", has_rotary=False),
    "granitemoehybrid": Hybrid(_granite, _listed),
    "jamba": Hybrid(_jamba, _listed, has_rotary=False),
    "lfm2": Hybrid(_lfm2, _listed),
    "lfm2_moe": Hybrid(_lfm2, _listed),
    "mamba": Hybrid(_of_mamba, all_layers="mamba", has_rotary=False),
    "mamba2": Hybrid(_of_mamba2, all_layers="mamba", has_rotary=False),
    "nemotron_h": Hybrid(_nemotron_h, _listed, has_rotary=False),
    "qwen3_5_moe_text": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": _DELTA_NET,
    "zamba2": Hybrid(_zamba2, _listed),
}  # by model_type
