"""The classes of Transformers that vLLM's Transformers backend changes, made usable again after an engine.

As it leaves them they ask for a config of vLLM's, and no test after it could make a checkpoint with them, whether or
not the engine was one with this plugin.
"""

from typing import Any

_MISSING = object()
# class: its attributes that vLLM changes, as they were, and as vLLM makes them
_changed: dict[type, tuple[dict[str, Any], dict[str, Any]]] = {}


def note() -> None:
    """From now on, note what vLLM changes in classes of Transformers, and change it again for each engine.

    Their bases stay as vLLM makes them: Dynamo calls methods of old models, which it never forgets.
    """
    from vllm.compilation import decorators

    decorate = decorators._support_torch_compile

    def noting(cls: type, *args: Any, **kwargs: Any) -> type:
        if not cls.__module__.startswith("transformers."):
            return decorate(cls, *args, **kwargs)
        if cls not in _changed:
            before = dict(vars(cls))
            decorate(cls, *args, **kwargs)
            made = {k: v for k, v in vars(cls).items() if v is not before.get(k, _MISSING)}
            _changed[cls] = {name: before.get(name, _MISSING) for name in made}, made
        _set(cls, _changed[cls][1])
        return cls

    decorators._support_torch_compile = noting


def restore() -> None:
    """Give all noted classes their own attributes again; no model of theirs may be in use."""
    for cls, (own, _) in _changed.items():
        _set(cls, own)


def _set(cls: type, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if value is not _MISSING:
            setattr(cls, name, value)
        elif name in vars(cls):
            delattr(cls, name)
