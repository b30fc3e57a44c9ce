"""Refused ways of writing weights into a running engine, and the error of each."""

from collections.abc import Callable
from typing import Any

import torch
from served import (
    AS_BEFORE,
    ATTENTION,
    DOWN,
    EMBEDDING,
    HOW,
    MLP,
    NORM,
    O_PROJ,
    QKV,
    Pairs,
    Served,
    fails_after,
)
from torch.nn import Parameter

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers.method import DESC


def larger(served: Served, name: str, dim: int) -> Pairs:
    """Return a tensor, doubled along `dim`."""
    return [(name, torch.cat([served.new[name]] * 2, dim).contiguous())]


def write_norm_then(served: Served, name: str) -> Pairs:
    return [(NORM, served.new[NORM]), (name, torch.zeros(4))]


def put_parameter(served: Served) -> None:
    served.layer(O_PROJ).weight = Parameter(served.new[f"{O_PROJ}.weight"], requires_grad=False)


def replace(served: Served) -> None:
    from vllm.model_executor.utils import replace_parameter

    replace_parameter(served.layer(O_PROJ), "weight", served.new[f"{O_PROJ}.weight"])


def shape(name: str, *size: int) -> Pairs:
    return [(name, torch.zeros(*size, dtype=torch.bfloat16))]


# name: (the call, the type of error, words of its message)
Refused = tuple[Callable[[Served], Any], type[BaseException], str]
REFUSED: dict[str, Refused] = {
    "reload of q alone": (
        lambda s: s.iterate(s.some("layers.0.self_attn.q_proj")),
        UnsupportedError,
        rf"{QKV}: .* weights arrived",
    ),
    "reload of a part of a layer that is BF16": (
        lambda s: s.iterate(s.some("layers.0.") + s.some(f"{MLP}.gate_proj")),
        UnsupportedError,
        rf"{MLP}\.gate_up_proj: [0-9]+ of [0-9]+ weights arrived; .* {AS_BEFORE}",
    ),
    "load_weights of a part of a layer that is BF16, which a CPU packs": (
        lambda s: s.model.load_weights(s.some(f"{MLP}.gate_proj")),
        UnsupportedError,
        rf"^{MLP}\.gate_up_proj\.weight: only a part of it was given, .* {AS_BEFORE}",
    ),
    "reload, values that are no tensor, as over HTTP": (
        lambda s: s.iterate([*s.some("layers.1."), (NORM, [1.0, 2.0])]),
        UnsupportedError,
        rf"{NORM}: list; expected a torch.Tensor. {AS_BEFORE}.*weights_path",
    ),
    "reload, the source raises": (
        lambda s: s.iterate(fails_after(s.some("layers.0."))),
        OSError,
        "the trainer is gone",
    ),
    "reload, another shape": (
        lambda s: s.iterate(s.some("layers.1.") + shape(f"{O_PROJ}.weight", 3, 3)),
        UnsupportedError,
        rf"{O_PROJ}.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "reload, a norm of another shape": (
        lambda s: s.iterate([*s.some("layers.1."), (NORM, torch.zeros(3))]),
        UnsupportedError,
        rf"{NORM} \[3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "reload, an unknown name": (
        lambda s: s.iterate(s.some("layers.1.") + shape("model.layers.7.mlp.up_proj.weight", 8, 8)),
        UnsupportedError,
        rf"layers\.7\.mlp\.up_proj\.weight \[8, 8\]: .*{AS_BEFORE}",
    ),
    "reload, a name twice": (
        lambda s: s.iterate(s.some(O_PROJ) + shape(f"{O_PROJ}.weight", 256, 256)),
        UnsupportedError,
        rf"{O_PROJ}\.weight: given twice",
    ),
    "load_weights, another shape": (
        lambda s: s.model.load_weights(s.some("layers.1.") + shape(f"{O_PROJ}.weight", 3, 3)),
        UnsupportedError,
        rf"{O_PROJ}.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "load_weights, q with twice the rows": (
        lambda s: s.model.load_weights(larger(s, f"{ATTENTION}.q_proj.weight", 0)),
        UnsupportedError,
        rf"q_proj.weight \[512, 256\]: 131072 weights; expected 65536, as many .*{AS_BEFORE}",
    ),
    "load_weights, a bias of k with twice the rows": (
        lambda s: s.model.load_weights(larger(s, f"{ATTENTION}.k_proj.bias", 0)),
        UnsupportedError,
        rf"k_proj.bias \[256\]: 256 weights; expected 128, as many .*{AS_BEFORE}",
    ),
    "load_weights, down with twice the columns": (
        lambda s: s.model.load_weights(larger(s, f"{DOWN}.weight", 1)),
        UnsupportedError,
        rf"down_proj.weight \[256, 3072\]: 786432 weights; expected 393216, as many .*{AS_BEFORE}",
    ),
    "reload, gate of a layer that is BF16 with twice the rows": (
        lambda s: s.iterate(s.some("layers.0.") + larger(s, f"{MLP}.gate_proj.weight", 0)),
        UnsupportedError,
        rf"gate_proj.weight \[3072, 256\]: 786432 weights; expected 393216, as many .*{AS_BEFORE}",
    ),
    "load_weights, the source raises": (
        lambda s: s.model.load_weights(fails_after(s.some("layers.0."))),
        OSError,
        "the trainer is gone",
    ),
    "load_weights of a submodule": (
        lambda s: s.model.model.load_weights([("layers.0.self_attn.o_proj.weight", s.new[f"{O_PROJ}.weight"])]),
        UnsupportedError,
        f"{O_PROJ}: weight_loader on its weight, which is {HOW}",
    ),
    "transfer, another shape": (
        lambda s: s.transfer(s.some("layers.1."), shape(f"{O_PROJ}.weight", 3, 3)),
        UnsupportedError,
        rf"{O_PROJ}.weight \[3, 3\]: could not be loaded .*{AS_BEFORE}",
    ),
    "transfer that ends early": (
        lambda s: s.transfer(s.some("layers.1."), s.some("layers.0.self_attn.q_proj")),
        UnsupportedError,
        rf"{QKV}: .* weights arrived",
    ),
    "transfer that breaks off": (
        lambda s: s.transfer(s.some("layers.1."), fails_after(s.some("layers.0.self_attn.q_proj"))),
        OSError,
        "the trainer is gone",
    ),
    "kernel format": (
        lambda s: s.iterate(write_norm_then(s, f"{O_PROJ}.weight"), is_checkpoint_format=False),
        UnsupportedError,
        f"{O_PROJ}: weight in kernel format on its weight, which is {HOW}",
    ),
    "kernel format, a descriptor": (
        lambda s: s.iterate(write_norm_then(s, f"{O_PROJ}.{DESC}"), is_checkpoint_format=False),
        UnsupportedError,
        f"{O_PROJ}: {DESC} in kernel format on its weight, which is {HOW}",
    ),
    "param.weight_loader": (
        lambda s: s.parameter(f"{QKV}.weight").weight_loader(
            s.parameter(f"{QKV}.weight"), s.new[f"{ATTENTION}.q_proj.weight"], "q"
        ),
        UnsupportedError,
        f"{QKV}: weight_loader on its weight, which is {HOW}",
    ),
    "layer.weight_loader": (
        lambda s: s.layer(O_PROJ).weight_loader(s.parameter(f"{O_PROJ}.weight"), s.new[f"{O_PROJ}.weight"]),
        UnsupportedError,
        f"{O_PROJ}: .* on its weight, which is {HOW}",
    ),
    "layer.weight_loader_v2": (
        lambda s: s.layer(O_PROJ).weight_loader_v2(s.parameter(f"{O_PROJ}.weight"), s.new[f"{O_PROJ}.weight"]),
        UnsupportedError,
        f"{O_PROJ}: weight_loader on its weight, which is {HOW}",
    ),
    "embedding.weight_loader": (
        lambda s: s.layer(EMBEDDING).weight_loader(
            s.parameter(f"{EMBEDDING}.weight"), s.new[f"{EMBEDDING}.weight"]
        ),
        UnsupportedError,
        f"model.embed_tokens: .* on its weight, which is {HOW}",
    ),
    "named_parameters, mul_": (
        lambda s: s.parameter(f"{DOWN}.weight").data.mul_(2),
        UnsupportedError,
        f"{DOWN}: mul_ on its weight, which is {HOW}",
    ),
    "state_dict, copy_": (
        lambda s: s.model.state_dict()[f"{O_PROJ}.weight"].copy_(s.new[f"{O_PROJ}.weight"]),
        UnsupportedError,
        f"{O_PROJ}: copy_ on its weight, which is {HOW}",
    ),
    "load_state_dict": (
        lambda s: s.model.load_state_dict(
            {name: s.new[name] for name in (NORM, f"{O_PROJ}.weight")}, strict=False
        ),
        UnsupportedError,
        f"{O_PROJ}: load_state_dict on its weight, which is {HOW}",
    ),
    "load_state_dict, strict": (
        lambda s: s.model.load_state_dict({NORM: s.new[NORM]}),
        UnsupportedError,
        f"model.embed_tokens: load_state_dict on its weight, which is {HOW}",
    ),
    "load_state_dict of a layer": (
        lambda s: s.layer(O_PROJ).load_state_dict({"weight": s.new[f"{O_PROJ}.weight"]}, assign=True),
        UnsupportedError,
        f"{O_PROJ}: load_state_dict on its weight, which is {HOW}",
    ),
    "setattr": (put_parameter, UnsupportedError, f"{O_PROJ}: another parameter .* on its weight, which is {HOW}"),
    "replace_parameter": (replace, UnsupportedError, f"{O_PROJ}: .* on its weight, which is {HOW}"),
    "save_sharded_state": (
        lambda s: s.llm.collective_rpc("save_sharded_state", kwargs={"path": str(s.second / "sharded")}),
        UnsupportedError,
        "save_sharded_state: .* Nothing was written. .*vllm-dfloat compress",
    ),
    "reset_weights": (
        lambda s: s.llm.collective_rpc("reset_weights"),
        UnsupportedError,
        f"{EMBEDDING}: reset_weights on its weight, which is {HOW}",
    ),
}  # fmt: skip
