"""A compressed weight that looks like a BF16 tensor; only what is copied of it is decoded.

vLLM's weight loaders cut out the part of a tensor that a rank needs, and copy it into a parameter. Cutting a LazyWeight
gives another LazyWeight. Copying decodes it into place, a bounded piece at a time. A weight that no loader copies (of
another pipeline stage, or an expert of another rank) is never decoded. Any other operation decodes the whole weight
into new memory: slower, but right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

PIECE_WEIGHTS = 1 << 23  # decoded at a time: 16 MiB of BF16

Read = Callable[[int, int], torch.Tensor]
Box = tuple[tuple[int, int], ...]

# What needs an address, which a wrapper does not have.
_OF_MEMORY = (
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.tolist,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
)


@dataclass(eq=False)
class _Stored:
    """What all cuts of one weight share.

    Attributes:
        read: as for a LazyWeight.
        shape: matrices, rows, columns.
        value: the contents, once somebody has written to the weight or to a cut of it.
    """

    read: Read
    shape: tuple[int, int, int]
    value: torch.Tensor | None = None


class LazyWeight(torch.Tensor):
    """A box of a stored weight: a range of each of its three dimensions. BF16 on the CPU; only what is used is read."""

    _stored: _Stored
    _box: Box
    _hidden: tuple[int, ...]  # dimensions of size 1 that the tensor's shape leaves out

    @staticmethod
    def __new__(cls, read: Read, shape: Sequence[int]) -> LazyWeight:
        """Return a weight that decodes itself.

        Args:
            read: (start, stop) -> weights start..stop of the flattened weight, BF16 [stop - start], on any device.
            shape: of the weight, one to three dimensions.
        """
        missing = 3 - len(shape)
        matrices, rows, cols = (1,) * missing + tuple(shape)
        box = ((0, matrices), (0, rows), (0, cols))
        stored = _Stored(read, (matrices, rows, cols))
        return cls._make(stored, box, tuple(range(missing)))

    @classmethod
    def _make(cls, stored: _Stored, box: Box, hidden: tuple[int, ...]) -> LazyWeight:
        shape = [stop - start for dim, (start, stop) in enumerate(box) if dim not in hidden]
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.bfloat16, device=torch.device("cpu")
        )
        self._stored, self._box, self._hidden = stored, box, hidden
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing must not decode
        return f"LazyWeight({list(self.shape)} of {list(self._stored.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(_decoded(args) if func in _OF_MEMORY else args), **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as a class method, which torch asks for
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        lazily = _LAZILY.get(func)
        if lazily is not None and not kwargs:
            result = lazily(*args)
            if result is not NotImplemented:
                return result
        target = args[0] if args else None
        if func._schema.is_mutable and isinstance(target, LazyWeight):
            target._keep_contents()
            func(*_decoded(args), **_decoded(dict(kwargs or {})))
            return target
        return func(*_decoded(args), **_decoded(dict(kwargs or {})))

    def cut(self, dim: int, start: int, stop: int, hide: bool = False) -> LazyWeight:
        """Return start to stop - 1 of a dimension; with `hide` the result's shape leaves that dimension out."""
        shown = [i for i in range(3) if i not in self._hidden]
        at = shown[dim]
        first = self._box[at][0]
        box = (*self._box[:at], (first + start, first + stop), *self._box[at + 1 :])
        hidden = tuple(sorted((*self._hidden, at))) if hide else self._hidden
        return self._make(self._stored, box, hidden)

    def same(self) -> LazyWeight:
        """Return another tensor with the same contents: torch accepts no view that is the tensor itself."""
        return self._make(self._stored, self._box, self._hidden)

    @property
    def is_written(self) -> bool:
        """Whether somebody has written to the weight, so that the stored one is not what it holds."""
        return self._stored.value is not None

    def _keep_contents(self) -> None:
        """Decode the whole weight into memory that all its cuts share from now on, as views of a tensor do."""
        if not self.is_written:
            whole = tuple((0, size) for size in self._stored.shape)
            self._stored.value = self._make(self._stored, whole, ()).decode()

    def copy_to(self, out: torch.Tensor) -> None:
        """Decode into `out`, of this tensor's shape and of any dtype and device, piece by piece."""
        for dim in self._hidden:
            out = out.unsqueeze(dim)
        (matrix, _), (row, _), (col, _) = self._box
        for (m, r, c), piece in self._pieces():
            part = out[m - matrix, r - row : r - row + piece.shape[0]]
            part[:, c - col : c - col + piece.shape[1]].copy_(piece)

    def _pieces(self) -> Iterator[tuple[tuple[int, int, int], torch.Tensor]]:
        """Yield ((matrix, row, column) of the first weight, BF16 [rows, columns]) until the box is covered."""
        read, (_, num_rows, num_cols) = self._stored.read, self._stored.shape
        (first_matrix, last_matrix), (first, last), (left, right) = self._box
        step = max(1, PIECE_WEIGHTS // max(1, num_cols))
        width = min(PIECE_WEIGHTS, max(1, right - left))
        for matrix in range(first_matrix, last_matrix):
            for row in range(first, last, step):
                end = min(row + step, last)
                at = (matrix * num_rows + row) * num_cols
                if end > row + 1:  # also decodes the columns between the parts of two rows
                    start, stop = at + left, at + (end - row - 1) * num_cols + right
                    rows = read(start, stop)
                    yield (matrix, row, left), _strided(rows, end - row, num_cols, right - left)
                    continue
                for col in range(left, right, width):
                    part = read(at + col, at + min(col + width, right))
                    yield (matrix, row, col), part[None]

    def decode(self) -> torch.Tensor:
        """Return the weight as an ordinary tensor on the CPU; once it was written to, as a view of its contents."""
        if self._stored.value is None:
            out = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu")
            self.copy_to(out)
            return out
        part = self._stored.value[tuple(slice(start, stop) for start, stop in self._box)]
        return part.squeeze(self._hidden)


def _strided(flat: torch.Tensor, rows: int, stride: int, cols: int) -> torch.Tensor:
    """Return the first `cols` of every `stride` weights as [rows, cols]."""
    return flat.as_strided((rows, cols), (stride, 1))


def _decoded(values: Any) -> Any:
    return tree_map_only(LazyWeight, LazyWeight.decode, values)


def _slice(
    weight: LazyWeight,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    if step != 1 or weight.is_written:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(weight.shape[dim])
    return weight.cut(dim % weight.dim(), begin, max(begin, stop))


def _select(weight: LazyWeight, dim: int, index: int) -> Any:
    size = weight.shape[dim]
    if weight.is_written or not -size <= index < size or weight.dim() == 1:
        return NotImplemented
    at = index % size
    return weight.cut(dim % weight.dim(), at, at + 1, hide=True)


def _same(weight: LazyWeight) -> Any:
    return NotImplemented if weight.is_written else weight.same()


def _copy(out: torch.Tensor, weight: Any, non_blocking: bool = False) -> Any:
    if isinstance(out, LazyWeight) or not isinstance(weight, LazyWeight):
        return NotImplemented
    if out.shape != weight.shape or weight.is_written:
        return NotImplemented
    if not out.is_meta:  # vLLM copies to the meta device to count
        weight.copy_to(out)
    return out


_LAZILY: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.select.int: _select,
    torch.ops.aten.detach.default: _same,
    torch.ops.aten.alias.default: _same,
    torch.ops.aten.copy_.default: _copy,
}
