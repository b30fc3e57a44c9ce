"""What small checks decode: a matrix whose last tile is partly filled, and some rows of one."""

import torch

ROWS, COLS = 37, 333


def some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return the first row, the last and another one; in the interpreter, where a row takes a second, only one."""
    rows = weight.shape[0]
    chosen = [0, rows - 1, rows // 2] if weight.is_cuda else [rows - 1]
    return torch.tensor(chosen, device=weight.device)
