"""A compressed weight that looks like a BF16 tensor; only what is copied of it is decoded.

vLLM's weight loaders cut out the part of a tensor that a rank needs, and copy it into a parameter. Any view of a
LazyWeight (a slice, a transpose, another shape, another dtype of the same bytes) is again a LazyWeight. Copying
decodes it into place, a bounded piece at a time. A weight that no loader copies (of another pipeline stage, or an
expert of another rank) is never decoded. Any other operation decodes what it is given into new memory: slower, but
right. An operation that writes decodes the whole weight first, once; all views then share this memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vllm_dfloat.checkpoint.flat_weight import FlatWeight, Read
from vllm_dfloat.errors import UnsupportedError

aten = torch.ops.aten
# What needs an address, which a wrapper does not have.
_OF_MEMORY = frozenset(
    [
        torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.Tensor.tolist, torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor.is_shared, torch.Tensor.pin_memory,
    ]
)  # fmt: skip
_OF_SHAPE = frozenset(
    getattr(aten, name)
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
                 "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
)  # fmt: skip


class LazyWeight(torch.Tensor):
    """A view of a stored weight, on the CPU; only what is used is read."""

    _stored: FlatWeight
    _meta: torch.Tensor  # the same view of a meta tensor: its shape, strides, offset and dtype

    @staticmethod
    def __new__(cls, read: Read, shape: Sequence[int]) -> LazyWeight:
        """Return a weight that decodes itself.

        Args:
            read: (start, stop) -> weights start..stop of the flattened weight, BF16 [stop - start], on any device.
            shape: of the weight.
        """
        meta = torch.empty(tuple(shape), dtype=torch.bfloat16, device="meta")
        return cls._make(FlatWeight(read, meta.numel()), meta)

    @classmethod
    def _make(cls, stored: FlatWeight, meta: torch.Tensor) -> LazyWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(),
            dtype=meta.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        self._stored, self._meta = stored, meta
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing must not decode
        return f"LazyWeight({list(self.shape)}, {self._stored.numel} weights stored)"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self.decode().clone())  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decode().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def share_memory_(self) -> LazyWeight:
        self._stored.memory().share_memory_()  # type: ignore[no-untyped-call]
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _OF_MEMORY:
            args = tree_map_only(LazyWeight, LazyWeight.in_memory, args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as a class method, which torch asks for
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.copy_.default and _is_copied_out(*args[:2]):
            args[1].copy_to(args[0])
            return args[0]
        if func.overloadpacket in _OF_SHAPE:
            kwargs["device"] = kwargs.get("device") or torch.device("cpu")
            return func(*tree_map_only(LazyWeight, lambda w: w._meta, args), **kwargs)
        if func._schema.is_mutable:
            return _write(func, args, kwargs)
        if _is_view(func, args):
            return _view(func, args, kwargs)
        return func(*_decoded(args), **_decoded(kwargs))

    def in_memory(self) -> torch.Tensor:
        """Return an ordinary tensor on the CPU, in memory that all views of the stored weight share from now on."""
        self._stored.memory()
        return self._stored.view(self._meta)

    def copy_to(self, out: torch.Tensor) -> None:
        """Decode into `out`, of this tensor's shape and of any dtype and device, piece by piece."""
        if not out.is_meta:  # vLLM copies to the meta device to count
            self._stored.copy(self._meta, out)

    def decode(self) -> torch.Tensor:
        """Return the weight as an ordinary tensor on the CPU."""
        if self._stored.value is not None:
            return self._stored.view(self._meta)
        out = torch.empty_like(self._meta, device="cpu")
        self.copy_to(out)
        return out


def _decoded(values: Any) -> Any:
    return tree_map_only(LazyWeight, LazyWeight.decode, values)


def _is_copied_out(out: torch.Tensor, weight: torch.Tensor) -> bool:
    is_lazy = isinstance(weight, LazyWeight) and not isinstance(out, LazyWeight)
    return is_lazy and out.shape == weight.shape  # else an ordinary copy broadcasts, or raises


def _is_view(func: Any, args: Any) -> bool:
    """Return whether an operation returns views of its first argument, a LazyWeight."""
    if not args or not isinstance(args[0], LazyWeight):
        return False
    return any(result.alias_info is not None for result in func._schema.returns)


def _view(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    stored, meta = args[0]._stored, args[0]._meta
    views = func(meta, *args[1:], **kwargs)
    return tree_map_only(torch.Tensor, lambda view: LazyWeight._make(stored, view), views)


def _write(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation that writes to some of its arguments; return those arguments themselves, as it does."""
    if torch.Tag.inplace_view in func.tags or func in (
        aten.resize_.default,
        aten.set_.source_Tensor,
    ):
        raise UnsupportedError(
            f"{func.overloadpacket.__name__}: it changes the shape of a weight that is decoded when it is copied; "
            "expected a function that returns a view, such as t() for t_()."
        )
    arguments = func._schema.arguments
    given = {
        **{argument.name: value for argument, value in zip(arguments, args, strict=False)},
        **kwargs,
    }
    written = {argument.name for argument in arguments if argument.is_write}
    plain = {
        name: tree_map_only(
            LazyWeight, LazyWeight.in_memory if name in written else LazyWeight.decode, value
        )
        for name, value in given.items()
    }
    lazy = {id(plain[name]): given[name] for name in written & given.keys()}
    positional = [plain.pop(argument.name) for argument in arguments[: len(args)]]
    result = func(*positional, **plain)
    return tree_map_only(torch.Tensor, lambda tensor: lazy.get(id(tensor), tensor), result)
