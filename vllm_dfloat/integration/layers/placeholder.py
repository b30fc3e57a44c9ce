"""The placeholder: a parameter of a compressed layer, such as `weight`, where vLLM and trainers expect BF16 values.

It has the weight's shape, dtype and device, but no values: one NaN, expanded. Code may read its shape, dtype or device.
Operations that read or write values raise one sentence with the layer's name and the supported way. Without the
placeholder, a trainer's write would be lost without an error, and the engine would keep answering from the old weights.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, Self

import torch
import torch._dynamo.config
from torch.nn import Parameter

from vllm_dfloat.errors import UnsupportedError

HOW = (
    "To change it, hand new weights to reload_weights, to the model's load_weights or to vLLM's weight transfer; to "
    "read it, call the layer's quant_method.dequantize_weight(layer); a layer named in `ignore` stays BF16."
)

_T: Any = torch.Tensor  # its annotations know no __get__
_VIEWS = frozenset(getattr(_T, name).__get__ for name in ("T", "H", "mT", "mH", "real", "imag"))
_ABOUT_IT = frozenset(
    [
        _T.size, _T.stride, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.storage_offset,
        _T.get_device, _T.is_contiguous, _T.is_complex, _T.is_floating_point, _T.is_signed, _T.is_inference,
        _T.is_shared, _T.is_pinned, _T.is_same_size, _T.__len__, _T.__hash__, _T._is_view, torch.is_floating_point,
        torch.is_complex, torch.is_inference, torch.numel, torch._has_compatible_shallow_copy_type,
    ]
)  # fmt: skip
_ATEN_ABOUT_IT = frozenset([torch.ops.aten.is_pinned.default, torch.ops.aten.is_same_size.default])
_ITSELF = frozenset(
    [_T.data.__get__, _T.detach, torch.detach, _T.requires_grad_, _T.cpu, _T.bfloat16]
)


Decode = Callable[[], torch.Tensor]

_detach_decodes = ContextVar("detach_decodes", default=False)


@contextmanager
def decoded_by_detach() -> Iterator[None]:
    """Let detach() return a decoded copy of the BF16 weight, for code that only reads it."""
    token = _detach_decodes.set(True)
    try:
        yield
    finally:
        _detach_decodes.reset(token)


_is_loading = ContextVar("is_loading", default=False)


@contextmanager
def while_loading() -> Iterator[None]:
    """Tell placeholders that a checkpoint is being loaded into a new model, so that a late tensor is one too many."""
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)


class WeightPlaceholder(Parameter):
    """A parameter without values.

    `data`, `detach()` and conversions to its own device and dtype return the placeholder itself, not a new view. A copy
    of the placeholder onto itself does nothing: vLLM ends the reload of a layer with one.
    """

    layer_name: str
    decode: Decode

    def __new__(
        cls, layer_name: str, shape: Sequence[int], device: torch.device, decode: Decode
    ) -> Self:
        """Return a placeholder for a BF16 weight of a layer, of this shape; `decode` returns the weight."""
        nan = torch.full([1] * len(shape), torch.nan, dtype=torch.bfloat16, device=device)
        self: Self = _T._make_subclass(cls, nan.expand(*shape), False)
        self.layer_name, self.decode = layer_name, decode
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.nn.Parameter(placeholder) returns the placeholder and calls this too. torch.utils.swap_tensors refuses
        # a tensor that has a weak reference, so the placeholder holds one to itself.
        self._stays = weakref.ref(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightPlaceholder({self.layer_name}: {list(self.shape)}, held compressed)"

    __format__ = object.__format__
    __str__ = __repr__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, WeightPlaceholder):
            if func is _T.detach and _detach_decodes.get():
                return first.decode()
            if _gives_itself(func, args, kwargs):
                return first
        if func is torch.equal or func is _T.equal:
            return args[0] is args[1]
        is_getter = getattr(func, "__name__", "") == "__get__" and func not in _VIEWS
        if func in _ABOUT_IT or is_getter:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _find(args, kwargs).refuse(_name_of(func))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares another one for itself
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse operations that do not call __torch_function__: torch.tensor, as_subclass, _make_subclass."""
        if func in _ATEN_ABOUT_IT:
            with torch._C._DisableTorchDispatch():
                return func(*args, **(kwargs or {}))
        _find(args, kwargs or {}).refuse(func.overloadpacket.__name__)

    def refuse(self, what: str) -> NoReturn:
        """Raise the error for an operation that needs values.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{self.layer_name}: {what} on its weight, which is held compressed; nothing was read or changed. {HOW}"
        )

    def weight_loader(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a weight loader of vLLM that is called directly on a loaded model, or once more while it is loaded."""
        if _is_loading.get():
            raise UnsupportedError(
                f"{self.layer_name}: more tensors came for it when all of its weights were there; expected each weight "
                "once. The checkpoint has some under two names, such as those of all experts in one tensor and one by "
                "one: remove one of the two."
            )
        self.refuse("weight_loader")

    # The methods of vLLM's own parameter classes that linear layers call in weight_loader_v2.
    load_column_parallel_weight = load_row_parallel_weight = weight_loader
    load_merged_column_weight = load_qkv_weight = weight_loader

    def set_(
        self, *args: Any, **kwargs: Any
    ) -> NoReturn:  # torch does not call __torch_function__ for set_
        self.refuse("set_")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.refuse("pickle")


def _gives_itself(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    this = args[0]
    if func in _ITSELF:
        return True
    if func is _T.copy_ or func == _T.data.__set__:
        return len(args) > 1 and args[1] is this
    if func == _T.grad.__set__:
        return args[1] is None
    if func is _T.cuda:
        return bool(this.is_cuda) and not (args[1:] or kwargs)
    if func is _T.to:
        copies = kwargs.get("copy", False)
        given = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **given)
        return not copies and device in (None, this.device) and dtype in (None, this.dtype)
    return False


def _find(*values: Any) -> WeightPlaceholder:
    """Return the placeholder among an operation's arguments."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, WeightPlaceholder):
            return value
        if isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
    raise UnsupportedError(f"an operation on a weight that is held compressed. {HOW}")


def _name_of(func: Callable[..., Any]) -> str:
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
        return f"reading {attribute}" if name == "__get__" else f"setting {attribute}"
    return name


# With this, Dynamo takes shape, dtype and device as constants and refuses all else; without, it would read the storage.
torch._dynamo.config.nontraceable_tensor_subclasses.add(WeightPlaceholder)
