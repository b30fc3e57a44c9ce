"""Whatever a weight loader does to a lazily decoded weight, it gets what an ordinary tensor would have given it."""

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import gaussian, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dfloat.checkpoint import flat_weight
from vllm_dfloat.checkpoint.lazy_weight import LazyWeight
from vllm_dfloat.errors import UnsupportedError

Step = Callable[[torch.Tensor], Any]
DTYPES = [torch.int16, torch.float16, torch.uint8, torch.float8_e4m3fn, torch.float32, torch.int64]


def plain_and_lazy(shape: tuple[int, ...]) -> tuple[torch.Tensor, LazyWeight]:
    plain = to_torch(gaussian(1, int(torch.Size(shape).numel()))).reshape(shape)
    stored = plain.reshape(-1).clone()
    return plain, LazyWeight(lambda start, stop: stored[start:stop], shape)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    plain = tensor.decode() if isinstance(tensor, LazyWeight) else tensor
    return (
        plain.dtype,
        plain.shape,
        plain.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist()
        if plain.dim()
        else plain.item(),
    )


# Each draws what it does for a tensor of the shape that it sees; it is then done to both.
def _dim(data: st.DataObject, tensor: torch.Tensor) -> int:
    return data.draw(st.integers(-tensor.dim(), tensor.dim() - 1))


def _range(data: st.DataObject, size: int) -> tuple[int, int]:
    start = data.draw(st.integers(0, size))
    return start, data.draw(st.integers(start, size))


def _sliced(data: st.DataObject, tensor: torch.Tensor) -> Step:
    index: list[Any] = []
    for size in tensor.shape[: data.draw(st.integers(1, tensor.dim()))]:
        start, stop = _range(data, size)
        kinds = [slice(None), slice(start, stop), slice(start, stop, 2), slice(-size or None, stop)]
        index.append(data.draw(st.sampled_from([*kinds, *([start % size] if size else [])])))
    if data.draw(st.booleans()):
        index = [..., *index] if len(index) == tensor.dim() else [*index, ...]
    if data.draw(st.booleans()):
        index = [None, *index]
    return lambda w: w[tuple(index)]


def _narrowed(data: st.DataObject, tensor: torch.Tensor) -> Step:
    dim = _dim(data, tensor)
    start, stop = _range(data, tensor.shape[dim])
    return lambda w: w.narrow(dim, start, stop - start)


def _permuted(data: st.DataObject, tensor: torch.Tensor) -> Step:
    dims = data.draw(st.permutations(range(tensor.dim())))
    return lambda w: w.permute(*dims)


def _transposed(data: st.DataObject, tensor: torch.Tensor) -> Step:
    one, other = _dim(data, tensor), _dim(data, tensor)
    return lambda w: w.transpose(one, other)


def _reshaped(data: st.DataObject, tensor: torch.Tensor) -> Step:
    numel = tensor.numel()
    factor = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8) if numel % n == 0]))
    shape = data.draw(
        st.sampled_from([(factor, -1), (-1, factor), (-1,), (factor, 1, -1), tuple(tensor.shape)])
    )
    name = data.draw(st.sampled_from(["view", "reshape"]))  # view may raise, for both alike
    return lambda w: getattr(w, name)(shape if numel else tuple(tensor.shape))


def _retyped(data: st.DataObject, tensor: torch.Tensor) -> Step:
    dtype = data.draw(st.sampled_from([*DTYPES, torch.bfloat16]))
    return lambda w: w.view(dtype)


def _split(data: st.DataObject, tensor: torch.Tensor) -> Step:
    dim, which = _dim(data, tensor), data.draw(st.integers(0, 5))
    kind = data.draw(st.sampled_from(["chunk", "unbind", "split", "tensor_split"]))
    args = (dim,) if kind == "unbind" else (data.draw(st.integers(1, 4)), dim)

    def split(w: torch.Tensor) -> torch.Tensor:
        parts = getattr(w, kind)(*args)
        return parts[which % len(parts)] if parts else w

    return split


def _other_view(data: st.DataObject, tensor: torch.Tensor) -> Step:
    dim, size = _dim(data, tensor), tensor.shape[-1]
    return data.draw(
        st.sampled_from(
            [
                lambda w: w.detach(), lambda w: w.data, lambda w: w.squeeze(), lambda w: w.unsqueeze(dim),
                lambda w: w.squeeze(dim), lambda w: w.mT, lambda w: w.contiguous(), lambda w: w.flatten(),
                lambda w: w.expand(2, *w.shape), lambda w: w.unflatten(-1, (1, size)), lambda w: w.movedim(dim, 0),
                lambda w: w.to(w.dtype), lambda w: w.cpu(), lambda w: torch.nn.Parameter(w, requires_grad=False),
                lambda w: w.diagonal(0, 0, -1) if w.dim() > 1 else w, lambda w: w.view_as(w), torch.atleast_2d,
            ]
        )
    )  # fmt: skip


VIEWS = [_sliced, _narrowed, _permuted, _transposed, _reshaped, _retyped, _split, _other_view]


def _ended(data: st.DataObject, tensor: torch.Tensor) -> Step:
    """End the chain with an operation that needs the values."""
    dim, size = _dim(data, tensor), tensor.shape[0]
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, max(0, size - 1)), max_size=5)), dtype=torch.long
    )
    rows = rows if size else rows[:0]
    ends: list[Step] = [
        lambda w: w, lambda w: w.clone(), lambda w: w.to(torch.float64), lambda w: w.to(torch.float64).t_()
        if w.dim() == 2 else w.float(), lambda w: torch.cat([w, torch.ones_like(w), w], dim),
        lambda w: torch.stack([torch.zeros_like(w), w]), lambda w: w.index_select(0, rows), lambda w: w[rows],
        lambda w: torch.empty_like(w).copy_(w), lambda w: copy.deepcopy(w), lambda w: w.repeat_interleave(2, dim),
        lambda w: w.repeat(*[2] * w.dim()), lambda w: w.contiguous().view(-1), lambda w: w.roll(1, 0),
        lambda w: w.flip(dim), lambda w: w.new_zeros(3), lambda w: w.clone().zero_(), lambda w: saved_and_loaded(w),
        lambda w: w.share_memory_(),
        lambda w: torch.from_numpy(w.view(torch.uint8).numpy().copy()), lambda w: torch.tensor(w.tolist()),
        lambda w: torch.nn.functional.pad(w, (0, 2)),
    ]  # fmt: skip
    return data.draw(st.sampled_from(ends))


def saved_and_loaded(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def done(step: Step, tensor: torch.Tensor) -> Any:
    """Return what a step gives, or the kind of error that it raises."""
    try:
        return step(tensor)
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        return type(error)


SHAPES = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 16)),
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8)),
)


@given(
    data=st.data(),
    shape=SHAPES,
    piece=st.sampled_from([1, 5, 64, 1 << 20]),
    gap=st.sampled_from([0, 7, 1 << 16]),
)
@settings(max_examples=400, deadline=None)
def test_any_chain_of_views_and_an_operation_gives_what_it_gives_for_a_plain_tensor(
    data: st.DataObject, shape: tuple[int, ...], piece: int, gap: int
) -> None:
    # Bug caught: `weight[:, a:b, :]` raised "View operation returned a tensor that is the same as the input base".
    plain, lazy = plain_and_lazy(shape)
    with mock.patch.multiple(flat_weight, PIECE_WEIGHTS=piece, GAP_WEIGHTS=gap):
        for draw in [*data.draw(st.lists(st.sampled_from(VIEWS), max_size=5)), _ended]:
            if not plain.dim():
                break
            step = draw(data, plain)
            expected, found = done(step, plain), done(step, lazy)
            if not isinstance(expected, torch.Tensor):
                assert found is expected
                continue
            assert isinstance(found, torch.Tensor), found
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert bits(found) == bits(expected)
            plain, lazy = expected, found


@given(data=st.data(), shape=SHAPES)
@settings(max_examples=150, deadline=None)
def test_what_is_written_through_a_view_is_seen_through_every_other(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    plain, lazy = plain_and_lazy(shape)
    views = [(plain, lazy)]
    for draw in data.draw(
        st.lists(st.sampled_from([_sliced, _permuted, _transposed, _narrowed]), max_size=4)
    ):
        of, like = views[data.draw(st.integers(0, len(views) - 1))]
        if of.dim():
            step = draw(data, of)
            views.append((step(of), step(like)))
    plain, lazy = views[data.draw(st.integers(0, len(views) - 1))]
    write = data.draw(
        st.sampled_from(
            [
                lambda w: w.fill_(3), lambda w: w.mul_(2), lambda w: w.copy_(torch.ones_like(w)), lambda w: w.zero_(),
                lambda w: w.add_(w.clone()), lambda w: torch.neg(w.clone(), out=w),
                lambda w: w.view(torch.int16).zero_() if w.dim() else w.zero_(),
            ]
        )
    )  # fmt: skip
    write(plain)
    result = write(lazy)
    assert isinstance(result, LazyWeight)
    for expected, found in views:
        assert bits(found) == bits(expected)


def test_a_view_of_any_kind_decodes_nothing_and_copies_only_what_it_shows() -> None:
    ranges: list[tuple[int, int]] = []
    stored = to_torch(gaussian(1, 24 * 40)).view(-1)

    def read(start: int, stop: int) -> torch.Tensor:
        ranges.append((start, stop))
        return stored[start:stop]

    lazy = LazyWeight(read, (4, 6, 40))
    view = lazy.transpose(1, 2)[2].t()[1:3].unsqueeze(0).view(torch.int16)
    assert isinstance(view, LazyWeight)
    assert not ranges
    out = torch.empty(1, 2, 40, dtype=torch.int16).copy_(view)
    assert torch.equal(out[0], stored.view(4, 6, 40)[2, 1:3].view(torch.int16))
    assert ranges == [((2 * 6 + 1) * 40, (2 * 6 + 3) * 40)]


@pytest.mark.parametrize("change", [torch.Tensor.t_, torch.Tensor.squeeze_, lambda w: w.resize_(2)])
def test_a_change_of_shape_in_place_is_refused(change: Step) -> None:
    _, lazy = plain_and_lazy((3, 4))
    with pytest.raises(
        UnsupportedError, match=r"shape of a weight that is decoded when it is copied"
    ):
        change(lazy)
