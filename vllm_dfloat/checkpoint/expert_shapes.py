"""Shapes of single experts, from a model class that holds all experts of a layer in two 3-D parameters.

Classes of Transformers 5 do; most checkpoints have a tensor per expert and matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

# Names of the matrices in checkpoints: of those that read the hidden states, and of the one that gives them.
_INNER, _OUTER = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"

Shape = tuple[int, ...]


def of_single_experts(parameters: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return module path -> (out_features, in_features) of every expert, under each name that checkpoints use.

    Args:
        parameters: name -> shape of all parameters of a model. Experts whose matrices the class has turned around, as
            gpt-oss and Llama 4 have, are left out: their checkpoints hold them in two tensors too.
    """
    found: dict[str, Shape] = {}
    for name, shape in parameters.items():
        experts, _, leaf = name.rpartition(".")
        down = parameters.get(f"{experts}.{_DOWN}", ())
        if leaf != _GATE_UP or len(shape) != 3 or len(down) != 3:
            continue
        count, (hidden, inner) = shape[0], down[1:]
        if tuple(shape) != (count, 2 * inner, hidden) or down[0] != count:
            continue
        for expert in range(count):
            found |= {f"{experts}.{expert}.{matrix}": (inner, hidden) for matrix in _INNER}
            found |= {f"{experts}.{expert}.{matrix}": (hidden, inner) for matrix in _OUTER}
    return found
