"""The states of families of models: how large they are, from the entries of their configs."""

from dataclasses import replace

from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.plan.states import ITEMSIZE, STATE_DTYPES, State


def _mamba2(text: Sizes, inner: int, heads: str, names: tuple[str, str, str, str]) -> State:
    """Return the state of a Mamba-2 layer; names: of the entries for groups, head dim, state and convolution."""
    groups, head_dim, width, kernel = (text.size(name) for name in names)
    numbers = text.size(heads) * head_dim * width
    return State(inner, kernel - 1, groups, 2 * width, numbers)


_NAMES = ("mamba_n_groups", "mamba_d_head", "mamba_d_state", "mamba_d_conv")


def falcon_h1(text: Sizes) -> State:
    inner = text.count("mamba_d_ssm") or text.size("mamba_expand", 2) * text.size("hidden_size")
    return _mamba2(text, inner, "mamba_n_heads", _NAMES)


def granite(text: Sizes) -> State:
    return _expanded(text, "mamba_n_groups")


def zamba2(text: Sizes) -> State:
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


def nemotron_h(text: Sizes) -> State:
    heads, head_dim = text.size("mamba_num_heads"), text.size("mamba_head_dim")
    width = text.size("ssm_state_size")
    dtype = text.text("mamba_ssm_cache_dtype", "float32")
    return State(
        heads * head_dim, text.size("conv_kernel") - 1, text.size("n_groups"), 2 * width, heads * head_dim * width,
        STATE_DTYPES.get(dtype) or ITEMSIZE,
    )  # fmt: skip


def of_mamba2(text: Sizes) -> State:
    inner = text.size("expand", 2) * text.size("hidden_size")
    return _mamba2(text, inner, "num_heads", ("n_groups", "head_dim", "state_size", "conv_kernel"))


def of_mamba(text: Sizes) -> State:
    inner = text.size("intermediate_size", text.size("expand", 2) * text.size("hidden_size"))
    return State(
        inner, text.size("conv_kernel", 4) - 1, numbers=inner * text.size("state_size", 16)
    )


def jamba(text: Sizes) -> State:
    inner = text.size("mamba_expand", 2) * text.size("hidden_size")
    return State(
        inner, text.size("mamba_d_conv", 4) - 1, numbers=inner * text.size("mamba_d_state", 16)
    )


def lfm2(text: Sizes) -> State:
    return State(text.size("conv_dim", text.size("hidden_size")), text.size("conv_L_cache") - 1)


def delta_net(text: Sizes) -> State:
    keys = text.size("linear_num_key_heads") * text.size("linear_key_head_dim")
    values = text.size("linear_num_value_heads") * text.size("linear_value_head_dim")
    dtype = text.text("mamba_ssm_dtype")
    return State(
        2 * keys + values, text.size("linear_conv_kernel_dim", 4) - 1,
        numbers=values * text.size("linear_key_head_dim"), itemsize=STATE_DTYPES.get(dtype) or ITEMSIZE,
    )  # fmt: skip


def _kimi_delta(text: Sizes, heads: int, head_dim: int, kernel: int) -> State:
    """Return the state of a layer of Kimi delta attention, whose recurrence is in float32."""
    width = heads * head_dim
    return State(
        3 * width, kernel - 1, numbers=width * head_dim, itemsize=4, dtypes=("auto", "float32", "bfloat16"),
    )  # fmt: skip


def kimi_linear(text: Sizes) -> State:
    given = text.part("linear_attn_config")
    sizes = (given.size(name) for name in ("num_heads", "head_dim", "short_conv_kernel_size"))
    return _kimi_delta(text, *sizes)


def bailing(text: Sizes) -> State:
    """Return the state of Ling and Ring: of lightning attention in 2.5, of Kimi delta attention in 3."""
    heads = text.size("num_attention_heads")
    head_dim = text.size("head_dim", max(1, text.size("hidden_size") // heads))
    if text.count("short_conv_kernel_size"):
        state = _kimi_delta(text, heads, head_dim, text.size("short_conv_kernel_size"))
        return replace(state, is_fixed=True)
    return State(0, 0, numbers=heads * head_dim * head_dim, is_fixed=True)
