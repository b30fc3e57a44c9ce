"""Operands on which two products differ in most results if they add in another order, and in some if they round twice.

Values as in a model do not show this: sums of FP32 are rounded to BF16, and a change in their last bits is seen in one
result of thousands. Here each product of an activation and a weight comes twice, with both signs, far apart. Nothing is
left of a sum but what was rounded on the way, and that is another number for another order.

What is left has few bits and is a BF16 number, so these sums do not show where they are rounded: before or after a bias
is added, or a router's weight multiplied. Some rows of weights are without pairs, and their sums are like others.
"""

import torch

from vllm_dfloat.codec.slabs import spans

ROWS_AT_ONCE = 4096  # of the weights
BIAS_SCALE = 2.0**-18  # about what rounding leaves of the sums: a larger bias would hide it
ROWS_A_PLAIN_ONE = 16  # a row of weights without pairs comes every so many rows


def operands(
    num_x: int, rows: int, cols: int, bias: torch.dtype | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return BF16 activations [num_x, cols] and weights [rows, cols], always the same, and a bias [rows] or None."""
    half = cols // 2
    generator = torch.Generator(device).manual_seed(0)  # vLLM's own stays as it is

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

    order = torch.randperm(cols, generator=generator, device=device)
    left, right = order[:half], order[half : 2 * half]

    def in_pairs(count: int, sign: int) -> torch.Tensor:
        """Return BF16 [count, cols] of many magnitudes; the second value of a pair is the first one times sign."""
        values = (normal(count, half) * torch.exp2(normal(count, half).round())).bfloat16()
        whole = torch.zeros(count, cols, dtype=torch.bfloat16, device=device)
        whole[:, left], whole[:, right] = values, sign * values
        return whole

    x = in_pairs(num_x, 1)
    weight = torch.empty(rows, cols, dtype=torch.bfloat16, device=device)
    for first, end in spans(rows, ROWS_AT_ONCE):
        weight[first:end] = in_pairs(end - first, -1)
        plain = weight[first:end:ROWS_A_PLAIN_ONE]
        plain.copy_(normal(*plain.shape) / cols**0.5)
    if bias is None:
        return x, weight, None
    values = normal(rows)
    values[torch.arange(rows, device=device) % ROWS_A_PLAIN_ONE > 0] *= BIAS_SCALE
    return x, weight, values.to(bias)
