"""Weights of the fast layout as an operand of the tensor cores of a warp, each step with the next 16 columns.

A thread decodes a group of 16 columns, four neighbouring threads 64. A step wants one group, of which each of these
threads holds four columns. So the four threads exchange words, each of two weights: what for one thread are the words
of a group is for the four a matrix to be turned over. In PTX; without it Triton exchanges, through shared memory.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PLAIN

_PLAIN = tl.constexpr(PLAIN)
_TILE_COLS = tl.constexpr(fast_layout.TILE_COLS)

# Operands: 4 results, 4 words. Of thread t and word w result s is word t of thread s: first neighbours exchange, then
# those two apart.
_TURN_OVER = """{
    .reg .pred %odd, %upper;
    .reg .u32 %lane, %first, %second;
    mov.u32 %lane, %laneid;
    and.b32 %first, %lane, 1;
    setp.ne.u32 %odd, %first, 0;
    and.b32 %first, %lane, 2;
    setp.ne.u32 %upper, %first, 0;
    selp.b32 %first, $4, $5, %odd;
    selp.b32 %second, $6, $7, %odd;
    shfl.sync.bfly.b32 %first, %first, 1, 31, 0xffffffff;
    shfl.sync.bfly.b32 %second, %second, 1, 31, 0xffffffff;
    selp.b32 $0, %first, $4, %odd;
    selp.b32 $1, $5, %first, %odd;
    selp.b32 $2, %second, $6, %odd;
    selp.b32 $3, $7, %second, %odd;
    selp.b32 %first, $0, $2, %upper;
    selp.b32 %second, $1, $3, %upper;
    shfl.sync.bfly.b32 %first, %first, 2, 31, 0xffffffff;
    shfl.sync.bfly.b32 %second, %second, 2, 31, 0xffffffff;
    selp.b32 $0, %first, $0, %upper;
    selp.b32 $2, $2, %first, %upper;
    selp.b32 $1, %second, $1, %upper;
    selp.b32 $3, $3, %second, %upper;
}"""
_TEXT: tl.constexpr = tl.constexpr(_TURN_OVER)


@triton.jit
def _turn_over(a, b, c, d):
    """Return of each group and its three neighbours the words of one column of pairs."""
    return tl.inline_asm_elementwise(
        _TEXT,
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [a, b, c, d],
        (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        False,
        1,
    )


@triton.jit
def _operand_in_order(
    a, b, c, d, e, f, g, h, BN: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr, IS_RIGHT: tl.constexpr
):  # fmt: skip
    """Return the words of each group, [2, BN, 4], as BF16 [BN, 128], or as a right operand [128, BN].

    Since Triton takes 32 columns of an operand for two steps, 4 columns of a thread together (WIDTH), the columns are
    in the order (two steps, half of a step, thread, step, one of two). Its interpreter takes 16 neighbours for a step:
    with a WIDTH of 2, in the plain form, columns are as in the matrix.
    """
    if FORM != _PLAIN:
        a, b, c, d = _turn_over(a, b, c, d)  # of the first 8 columns of each step
        e, f, g, h = _turn_over(e, f, g, h)
    left = tl.join(tl.join(a, e), tl.join(c, g))
    right = tl.join(tl.join(b, f), tl.join(d, h))
    words = tl.join(left, right)
    pairs = tl.join(words & 0xFFFF, words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    # Not transposed afterwards: to do that Triton takes the weights through shared memory.
    if FORM != _PLAIN:  # [block, row, thread, half, step / 2, step % 2, one of two]
        pairs = tl.permute(pairs, (0, 4, 3, 2, 5, 6, 1) if IS_RIGHT else (1, 0, 4, 3, 2, 5, 6))
    else:  # [block, row, (step / 2, step % 2), half, (thread / 2, thread % 2), one of two]
        pairs = tl.reshape(pairs, [_TILE_COLS // 64, BN, 2, 2, 2, 4, 2])
        if WIDTH == 2:
            pairs = tl.permute(pairs, (0, 2, 3, 4, 5, 6, 1) if IS_RIGHT else (1, 0, 2, 3, 4, 5, 6))
        else:
            pairs = tl.permute(pairs, (0, 2, 4, 5, 3, 6, 1) if IS_RIGHT else (1, 0, 2, 4, 5, 3, 6))
    return tl.reshape(pairs, [_TILE_COLS, BN] if IS_RIGHT else [BN, _TILE_COLS])
