"""Find embeddings and LM heads whose BF16 values a model's own code reads, by looking at that code.

A compressed layer has no values in `weight`, so `F.linear(x, self.embed_tokens.weight)` would be refused. Reading its
shape, dtype or device is fine, and so is giving the parameter to another layer, which tying.py handles.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# Attributes of a parameter that need no values.
_ABOUT_IT = frozenset(
    ["dtype", "device", "shape", "ndim", "is_cuda", "size", "dim", "numel", "weight_loader"]
)
_BASES = (
    "torch.",
    "vllm.model_executor.layers.",
    "vllm.model_executor.custom_op",
)  # not models' code
UNREADABLE = "*"  # stands for every name


def names_read(model: torch.nn.Module) -> frozenset[str]:
    """Return the attribute names whose `.weight` the code of a model's classes reads, such as "embed_tokens".

    It looks at the classes and at the functions beside them. Without their source it returns {UNREADABLE}.
    """
    classes = {cls for layer in model.modules() for cls in type(layer).__mro__}
    return frozenset().union(*(_of_class(cls) for cls in classes if _is_of_models(cls)))


def is_read(layer: torch.nn.Module, path: str, names: frozenset[str]) -> bool:
    """Return whether the layer at `path` of a model is one that its code reads, given the result of `names_read`."""
    own = (_of_class(cls) for cls in type(layer).__mro__ if _is_of_models(cls))
    return bool({path.rpartition(".")[2], UNREADABLE} & names) or any(
        "self" in found for found in own
    )


def _is_of_models(cls: type) -> bool:
    return cls.__module__ != "builtins" and not f"{cls.__module__}.".startswith(
        (*_BASES, "typing.", "abc.", "vllm_dfloat.")
    )


@functools.cache
def _of_class(cls: type) -> frozenset[str]:
    tree = _parsed(cls.__module__)
    if tree is None:
        return frozenset([UNREADABLE])
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
    beside = [node for node in tree.body if _is_helper(node, cls.__module__)]
    return frozenset(name for node in [*found, *beside] for name in _names_in(node))


def _is_helper(node: ast.AST, module: str) -> bool:
    """Return whether a module defines a function here, or a class of something else than a part of the model."""
    if isinstance(node, ast.ClassDef):
        cls = getattr(sys.modules[module], node.name, None)
        return isinstance(cls, type) and not issubclass(cls, torch.nn.Module)
    return isinstance(node, ast.FunctionDef)


def _nodes(root: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `root`, except those of classes in it: these are looked at if the model has them."""
    for node in ast.iter_child_nodes(root):
        if not isinstance(node, ast.ClassDef):
            yield node
            yield from _nodes(node)


@functools.cache
def _parsed(module: str) -> ast.Module | None:
    try:
        return ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return None


def _names_in(root: ast.AST) -> Iterator[str]:
    """Yield the names of what has its weight read, and the attributes of which such a variable is an alias."""
    aliases: dict[str, set[str]] = {}
    harmless: set[ast.AST] = set()
    for node in _nodes(root):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    aliases.setdefault(target.id, set()).update(_owner(node.value))
                if isinstance(target, ast.Attribute) and target.attr == "weight":
                    harmless.add(node.value)  # a parameter that two layers share
        elif isinstance(node, ast.Attribute) and node.attr in _ABOUT_IT:
            harmless.add(node.value)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "isinstance"
        ):
            harmless.update(node.args)
    for node in _nodes(root):
        is_load = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if is_load and node.attr == "weight" and node not in harmless:  # type: ignore[attr-defined]
            for name in _owner(node.value):  # type: ignore[attr-defined]
                yield name
                yield from aliases.get(name, ())


def _owner(node: Any) -> Iterable[str]:
    """Return the last name of an expression: of `self.model.embed_tokens` that is embed_tokens."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Subscript):
        return _owner(node.value)
    if isinstance(node, ast.Call):
        name = next(iter(_owner(node.func)), "")
        if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            return [str(node.args[1].value)]
        return [UNREADABLE] if name in ("get_input_embeddings", "get_output_embeddings") else []
    return []
