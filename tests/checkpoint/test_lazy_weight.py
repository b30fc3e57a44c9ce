"""Weights that are decoded while they are copied, in pieces: the bits of whole tensors after every operation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import gaussian, poisoned, same_bits, to_torch, unlike

from vllm_dfloat.checkpoint import flat_weight
from vllm_dfloat.checkpoint.lazy_weight import LazyWeight

ROWS, COLS = 48, 40


class Reader:
    """Reads from a given tensor and records the requested ranges."""

    def __init__(self, *shape: int) -> None:
        numel = int(torch.Size(shape).numel())
        self.weight = to_torch(gaussian(1, numel)).view(shape)
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        self.ranges.append((start, stop))
        return self.weight.view(-1)[start:stop].clone()

    def lazy(self) -> LazyWeight:
        return LazyWeight(self, self.weight.shape)


CUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda w: w,
    "rows": lambda w: w.narrow(0, 8, 16),
    "columns": lambda w: w.narrow(1, 10, 10),
    "last columns": lambda w: w[:, 35:],
    "rows, then columns, then rows": lambda w: w.narrow(0, 8, 30).narrow(1, 3, 30)[5:21],
    "one row": lambda w: w[7],
    "part of one row": lambda w: w[7, 3:9],
    "one column": lambda w: w[:, 5],
    "from the end": lambda w: w[-9:-2, -11:],
    "nothing": lambda w: w[5:5],
    "all rows and all columns, one after the other": lambda w: w[:, 0:COLS][0:ROWS],
    "all rows, columns": lambda w: w[:, 8:24],
    "every dimension in full": lambda w: w[0:ROWS, 0:COLS],
    "detached": lambda w: w.detach()[3:9],
}


@pytest.mark.parametrize("piece", [1, 7, 64, 333, 1 << 23])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_cut_copies_the_bits_that_the_cut_of_the_tensor_has(
    cut: Callable[[torch.Tensor], torch.Tensor], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_weight, "PIECE_WEIGHTS", piece)
    reader = Reader(ROWS, COLS)
    expected = cut(reader.weight)
    lazy = cut(reader.lazy())
    assert isinstance(lazy, LazyWeight)
    assert lazy.shape == expected.shape
    assert not reader.ranges, "something was decoded before it was copied"
    out = poisoned(tuple(expected.shape), unlike(gaussian(1, 1)), torch.device("cpu"))
    out.copy_(lazy)
    assert same_bits(out, expected)
    beside = poisoned((expected.shape[0], 2 * COLS), 0x7FC1, torch.device("cpu"))
    if expected.dim() == 2:  # into columns of something wider
        beside[:, 3 : 3 + expected.shape[1]].copy_(lazy)
        assert same_bits(beside[:, 3 : 3 + expected.shape[1]], expected)
        assert beside[:, :3].isnan().all()
        assert beside[:, 3 + expected.shape[1] :].isnan().all()
    assert all(stop - start <= max(piece, COLS) for start, stop in reader.ranges)


def test_only_the_rows_that_are_copied_are_read() -> None:
    reader = Reader(ROWS, COLS)
    torch.empty(6, COLS, dtype=torch.bfloat16).copy_(reader.lazy().narrow(0, 12, 6))
    assert reader.ranges == [(12 * COLS, 18 * COLS)]


def test_experts_in_one_tensor_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_weight, "GAP_WEIGHTS", 8)
    reader = Reader(5, 6, 8)
    lazy = reader.lazy()
    for expert in (3, 0):
        part = lazy[expert].narrow(0, 2, 3)
        assert same_bits(
            torch.zeros(3, 8, dtype=torch.bfloat16).copy_(part), reader.weight[expert, 2:5]
        )
    assert same_bits(lazy.narrow(1, 1, 2).decode(), reader.weight[:, 1:3])
    assert len(reader.ranges) == 2 + 5


OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed": lambda w: w.t().contiguous(),
    "permuted": lambda w: w.view(4, 12, COLS).transpose(0, 1).reshape(ROWS, COLS),
    "converted": lambda w: w.to(torch.float32),
    "cloned": lambda w: w.clone(),
    "chunked": lambda w: torch.cat(w.chunk(3, dim=1)[::-1], dim=1),
    "every other row": lambda w: w[::2],
    "indexed": lambda w: w[torch.tensor([4, 1])],
    "summed": lambda w: w.sum(),
    "compared": lambda w: torch.equal(w, w.clone()),
    "as numpy": lambda w: torch.from_numpy(w.float().numpy()),
    "as list": lambda w: w.tolist(),
    "stacked with others": lambda w: torch.stack([w, torch.ones_like(w)]),
    "written to": lambda w: w.mul_(2)[1:5].clone(),
    "filled in part": lambda w: w.zero_(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_other_operation_sees_the_decoded_weight(operation: Callable[..., Any]) -> None:
    reader = Reader(ROWS, COLS)
    expected = operation(reader.weight.clone())
    found = operation(reader.lazy())
    if not isinstance(expected, torch.Tensor):
        assert found == expected
        return
    plain = found.decode() if isinstance(found, LazyWeight) else found
    assert plain.dtype == expected.dtype
    assert torch.equal(plain, expected)


def test_what_is_written_to_stays_written() -> None:
    lazy = Reader(ROWS, COLS).lazy()
    lazy.fill_(3)
    out = torch.zeros(ROWS, COLS, dtype=torch.bfloat16).copy_(lazy)
    assert (out == 3).all()
    assert (lazy[5] == 3).all()


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a cut": lambda w: w[3:9].mul_(2),
    "a cut of a cut": lambda w: w[3:9][:, 5:7].fill_(1),
    "one row": lambda w: w[7].zero_(),
    "what is detached": lambda w: w.detach().neg_(),
    "a cut, then what another cut sees": lambda w: (w[3:9].zero_(), w[8:10].add_(w[4:6])),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_to_a_cut_is_seen_by_the_weight_and_by_its_other_cuts(
    write: Callable[[torch.Tensor], Any],
) -> None:
    # Bug caught: a write to a cut changed a copy of it, and the weight was loaded without it.
    reader = Reader(ROWS, COLS)
    expected, lazy = reader.weight.clone(), reader.lazy()
    before = lazy[2:30]
    write(expected)
    write(lazy)
    assert same_bits(torch.zeros(ROWS, COLS, dtype=torch.bfloat16).copy_(lazy), expected)
    assert same_bits(before.decode(), expected[2:30])
    assert same_bits(torch.zeros(COLS, dtype=torch.bfloat16).copy_(before[5]), expected[7])


def test_counting_on_the_meta_device_decodes_nothing() -> None:
    reader = Reader(ROWS, COLS)
    torch.empty(ROWS, COLS, dtype=torch.bfloat16, device="meta").copy_(reader.lazy())
    assert not reader.ranges


def test_a_copy_converts_and_broadcasts_as_any_copy_does() -> None:
    reader = Reader(ROWS, COLS)
    assert torch.equal(torch.empty(ROWS, COLS).copy_(reader.lazy()), reader.weight.float())
    wide = torch.empty(2, ROWS, COLS, dtype=torch.bfloat16).copy_(reader.lazy())
    assert torch.equal(wide[1], reader.weight)
    with pytest.raises(RuntimeError, match="must match"):
        torch.empty(ROWS, COLS + 1).copy_(reader.lazy())
