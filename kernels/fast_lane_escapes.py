"""Escapes of the fast layout for warps that have 8 or 16 rows of one tile of weights each, or 32 rows of half of one.

Entries of a tile are loaded one turn ahead, one per thread, and threads hand them to each other; so the loop over
escapes does not touch memory, except where a tile has more than 32. A tile has 64 rows: a vote finds the entries that
are for the rows of the warp. In PTX only; without it, as in fast_escapes.py.

A thread waits for loads by one of six counters, and the compiler gives one counter to all loads whose values are used
beyond a branch. So what is read from memory on a path of its own is changed there (by an operation that leaves it as it
is): else the values of both paths would be waited for where these meet, and with them all that was loaded ahead.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.kernels.fast_escapes import PLAIN, _patch

_PLAIN = tl.constexpr(PLAIN)
_TILE_GROUPS = fast_layout.TILE_WEIGHTS // fast_layout.GROUP

# Operands: a word, the first entry of a tile, its last + 1, the address of all entries. A thread without an entry gets
# ones, a number that no group has.
_FETCH = """{
    .reg .pred %in;
    .reg .u32 %n, %lane, %at;
    .reg .u64 %from;
    mov.u32 %lane, %laneid;
    sub.u32 %n, $2, $1;
    setp.lt.u32 %in, %lane, %n;
    add.u32 %at, $1, %lane;
    mad.wide.u32 %from, %at, 4, $3;
    mov.u32 $0, 0xffffffff;
    @%in ld.global.u32 $0, [%from];
}"""

# Operands: 8 * PACK results and as many words, then PACK times each: the group's number in the tile, the tile's first
# entry, its last + 1, the thread's entry, the address of all entries. An entry is explained in fast_escapes.py.
_PATCH = """{
    .reg .pred %stop, %is_raw, %in, %here;
    .reg .u32 %n, %lane, %entry, %rows, %which, %one, %key, %order, %wanted, %zero, %left<PACK>;
    .reg .u64 %from, %to;
    COPY_WORDS
    and.b32 %rows, GROUP, MASK;
    shl.b32 %rows, %rows, 20;
    CHECK
    sub.u32 %n, END, BEGIN;
    setp.eq.u32 %stop, %n, 0;
    @%stop bra DONE;
    mad.wide.u32 %from, BEGIN, 4, ADDRESS;
    setp.eq.u32 %is_raw, %n, RAW_ENTRIES;
    @%is_raw bra RAW;
    min.u32 %n, %n, MAX_ESCAPES;
    mov.u32 %lane, %laneid;
    mov.u32 %entry, FETCHED;
BATCH:
    .pragma "nounroll";
    and.b32 %key, %entry, ENTRY_MASK;
    setp.lt.u32 %in, %lane, %n;
    setp.eq.and.u32 %in, %key, %rows, %in;
    vote.sync.ballot.b32 %wanted, %in, 0xffffffff;
    setp.eq.u32 %stop, %wanted, 0;
    @%stop bra AFTER;
NEXT:
    .pragma "nounroll";
    brev.b32 %which, %wanted;
    bfind.shiftamt.u32 %which, %which;
    shfl.sync.idx.b32 %one, %entry, %which, 31, 0xffffffff;
    sub.u32 %which, %wanted, 1;
    and.b32 %wanted, %wanted, %which;
    shr.u32 %key, %one, 17;
    and.b32 %order, %one, 0x10000;
    setp.eq.u32 %in, %order, 0;
    selp.b32 %order, 0x3254, 0x5410, %in;
    INSERT
    setp.ne.u32 %in, %wanted, 0;
    @%in bra NEXT;
AFTER:
    setp.le.u32 %stop, %n, 32;
    @%stop bra DONE;
    sub.u32 %n, %n, 32;
    add.u64 %from, %from, 128;
    setp.lt.u32 %in, %lane, %n;
    mad.wide.u32 %to, %lane, 4, %from;
    @%in ld.global.u32 %entry, [%to];
    min.u32 %entry, %entry, 0x1fffffff;
    bra BATCH;
RAW:
    shr.u32 %zero, BEGIN, 31;
    LOAD
DONE:
}"""


def _groups_of_thread(rows: int, cols: int) -> int:
    """Return how many groups of a tile each thread of a warp has, which are looked at together."""
    return rows * cols // fast_layout.GROUP // 32


def _text(rows: int, cols: int) -> str:
    """Return `_PATCH` for a warp with so many rows and columns of weights."""
    pack = _groups_of_thread(rows, cols)
    of_row = fast_layout.TILE_COLS // fast_layout.GROUP
    # The bits of a group's number that all groups of the warp have in common.
    mask = _TILE_GROUPS - rows * of_row + of_row - cols // fast_layout.GROUP

    def line(*parts: str) -> str:
        return " ".join(parts) + "\n    "

    each = range(pack)
    groups = [f"${16 * pack + i}" for i in each]
    copy = "".join(line(f"mov.b32 ${i}, ${8 * pack + i};") for i in range(8 * pack))
    check = "".join(
        line(f"setp.ne.u32 %stop, BEGIN, ${17 * pack + i}; @%stop trap;")
        + line(f"and.b32 %key, {groups[i]}, MASK; shl.b32 %key, %key, 20;")
        + line("setp.ne.u32 %stop, %key, %rows; @%stop trap;")
        for i in each[1:]
    )
    insert = "".join(
        line(f"shl.b32 %left{i}, {groups[i]}, 3; sub.u32 %left{i}, %key, %left{i};") for i in each
    )
    insert += "".join(
        line(
            f"setp.eq.u32 %here, %left{i}, {k};",
            f"@%here prmt.b32 ${k * pack + i}, ${k * pack + i}, %one, %order;",
        )
        for i in each
        for k in range(8)
    )
    load = ""
    for i in each:
        load += line(f"mad.wide.u32 %to, {groups[i]}, 32, %from;")
        for k in range(8):
            load += line(
                f"ld.global.u32 %one, [%to + {4 * k}];", f"or.b32 ${k * pack + i}, %one, %zero;"
            )
    values = {
        "COPY_WORDS": copy, "CHECK": check, "INSERT": insert, "LOAD": load, "RAW_ENTRIES": fast_layout.RAW_ENTRIES,
        "MAX_ESCAPES": fast_layout.MAX_ESCAPES, "PACK": pack, "GROUP": groups[0], "ENTRY_MASK": mask << 20,
        "MASK": mask, "BEGIN": f"${17 * pack}", "END": f"${18 * pack}", "FETCHED": f"${19 * pack}",
        "ADDRESS": f"${20 * pack}",
    }  # fmt: skip
    text = _PATCH
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text


def _registers(rows: int, cols: int) -> str:
    pack = _groups_of_thread(rows, cols)
    return ",".join(["=&r"] * 8 * pack + ["r"] * 12 * pack + ["l"] * pack)


_FETCH_TEXT: tl.constexpr = tl.constexpr(_FETCH)
_PATCH_8: tl.constexpr = tl.constexpr(_text(8, 128))
_PATCH_16: tl.constexpr = tl.constexpr(_text(16, 128))
_PATCH_32: tl.constexpr = tl.constexpr(_text(32, 64))
_REGISTERS_8: tl.constexpr = tl.constexpr(_registers(8, 128))
_REGISTERS_16: tl.constexpr = tl.constexpr(_registers(16, 128))


@triton.jit
def _fetch(begin, end, entries_ptr, FORM: tl.constexpr):
    """Return the entry of a tile that this thread holds: not one number, but one for each thread.

    begin, end: int32, from `_bounded`; numbers, or tensors in which all threads of a warp have the same ones.
    """
    if FORM == _PLAIN:
        return begin
    else:
        return tl.inline_asm_elementwise(
            _FETCH_TEXT, "=&r,r,r,l", [begin, end, entries_ptr.to(tl.uint64)], tl.int32, False, 1
        )


@triton.jit
def _patch_by_lane(
    a, b, c, d, e, f, g, h, group, begin, end, fetched, entries_ptr, ROWS: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Return the 8 words [A, B, C] of each group with the escapes of its tile in place.

    Args:
        group: int32 [A, B, C], the group's number in its tile; those of a warp are of ROWS neighbouring rows, the first
            a multiple of so many, and with 32 rows of the first or last 64 columns, or the kernel is stopped.
        begin, end: int32, from `_bounded`: entries of the tile.
        fetched: the thread's entry, from `_fetch`.
        ROWS: rows of weights of the warp, 8, 16 or 32.
    """
    if FORM == _PLAIN:
        return _patch(a, b, c, d, e, f, g, h, group, begin, end, entries_ptr, FORM, 1)
    else:
        # Not pure: so it stays before the loads that follow; see above.
        return tl.inline_asm_elementwise(
            _PATCH_8 if ROWS == 8 else _PATCH_16 if ROWS == 16 else _PATCH_32,
            _REGISTERS_8 if ROWS == 8 else _REGISTERS_16,
            [a, b, c, d, e, f, g, h, group, begin, end, fetched, entries_ptr.to(tl.uint64)],
            (
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
                tl.uint32,
            ),
            False,
            2 if ROWS == 8 else 4,
        )
