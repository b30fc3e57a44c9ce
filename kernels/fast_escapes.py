"""Put the escapes of the fast layout among weights that are in registers, before anything is computed from them.

A thread has groups of 16 weights of a row, each as 8 words of two weights. There are three forms with the same bits.
PLAIN is Triton alone, which the interpreter can run. PATCHED looks for escapes in PTX: a `while` within a loop would
keep Triton from loading ahead in that loop. PERMUTED, besides, joins bytes with the instruction `prmt`.

For any bytes of a payload the loops have a constant bound and no read leaves the entries.
"""

import triton
import triton.language as tl

from vllm_dfloat.codec import fast_layout

PLAIN = 0
PATCHED = 1
PERMUTED = 2
FORMS = (PLAIN, PATCHED, PERMUTED)

_TILE_GROUPS = fast_layout.TILE_WEIGHTS // fast_layout.GROUP
_PLAIN = tl.constexpr(PLAIN)
_RAW_ENTRIES = tl.constexpr(fast_layout.RAW_ENTRIES)
_MAX_ESCAPES = tl.constexpr(fast_layout.MAX_ESCAPES)
_GROUPS = tl.constexpr(_TILE_GROUPS)

# In PTX a loop looks at every entry of a tile for PACK groups of a thread, which lie in this tile. Operands: 8 * PACK
# results and as many words, PACK numbers of groups in the tile, then PACK times the tile's first entry, its last + 1,
# and the address of all entries; a thread whose groups lie in different tiles stops the kernel. An entry holds the
# number of its group in the tile (9 bits), a word of the group (3 bits) and half of it (1 bit), and a weight (16 bits).
_PATCH = """{
    .reg .pred %stop, %any, %raw, %in, %here, %at<PACK>;
    .reg .u32 %n, %entry, %place, %order;
    .reg .u64 %from, %to;
    COPY_WORDS
    CHECK
    sub.u32 %n, END, BEGIN;
    setp.eq.u32 %stop, %n, 0;
    @%stop bra DONE;
    mad.wide.u32 %from, BEGIN, 4, ADDRESS;
    setp.eq.u32 %raw, %n, RAW_ENTRIES;
    @%raw bra RAW;
    min.u32 %n, %n, MAX_ESCAPES;
    mad.wide.u32 %to, %n, 4, %from;
NEXT:
    .pragma "nounroll";
    ld.global.u32 %entry, [%from];
    shr.u32 %place, %entry, 20;
    COMPARE
    add.u64 %from, %from, 4;
    setp.lt.u64 %stop, %from, %to;
    @!%any bra AFTER;
    shr.u32 %place, %entry, 17;
    and.b32 %place, %place, 7;
    and.b32 %order, %entry, 0x10000;
    setp.eq.u32 %in, %order, 0;
    selp.b32 %order, 0x3254, 0x5410, %in;
    INSERT
AFTER:
    @%stop bra NEXT;
    bra DONE;
RAW:
    LOAD
DONE:
}"""


def _patch_text(pack: int) -> str:
    def line(*parts: str) -> str:
        return " ".join(parts) + "\n    "

    each = range(pack)
    copy = "".join(line(f"mov.b32 ${i}, ${8 * pack + i};") for i in range(8 * pack))
    check = "".join(
        line(f"setp.ne.u32 %stop, BEGIN, ${17 * pack + i}; @%stop trap;") for i in range(1, pack)
    )
    compare = line(f"setp.eq.u32 %at0, %place, ${16 * pack};", "mov.pred %any, %at0;")
    for i in range(1, pack):
        compare += line(
            f"setp.eq.u32 %at{i}, %place, ${16 * pack + i};", f"or.pred %any, %any, %at{i};"
        )
    insert = "".join(
        line(
            f"setp.eq.and.u32 %here, %place, {k}, %at{i};",
            f"@%here prmt.b32 ${k * pack + i}, ${k * pack + i}, %entry, %order;",
        )
        for i in each
        for k in range(8)
    )
    load = ""
    for i in each:
        group = f"${16 * pack + i}"
        load += line(f"setp.lt.u32 %in, {group}, GROUPS;", f"mad.wide.u32 %to, {group}, 32, %from;")
        for k in range(8):
            load += line(f"@%in ld.global.u32 ${k * pack + i}, [%to + {4 * k}];")
    values = {
        "COPY_WORDS": copy, "CHECK": check, "COMPARE": compare, "INSERT": insert, "LOAD": load,
        "RAW_ENTRIES": fast_layout.RAW_ENTRIES, "MAX_ESCAPES": fast_layout.MAX_ESCAPES, "GROUPS": _TILE_GROUPS,
        "PACK": pack, "BEGIN": f"${17 * pack}", "END": f"${18 * pack}", "ADDRESS": f"${19 * pack}",
    }  # fmt: skip
    text = _PATCH
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text


def _patch_registers(pack: int) -> str:
    return ",".join(["=&r"] * 8 * pack + ["r"] * 11 * pack + ["l"] * pack)


_PATCH_1: tl.constexpr = tl.constexpr(_patch_text(1))
_PATCH_4: tl.constexpr = tl.constexpr(_patch_text(4))
_REGISTERS_1: tl.constexpr = tl.constexpr(_patch_registers(1))
_REGISTERS_4: tl.constexpr = tl.constexpr(_patch_registers(4))


@triton.jit
def _split_four(words):
    """Split [A, B, C, 4] into four [A, B, C]."""
    pairs = tl.reshape(words, [words.shape[0], words.shape[1], words.shape[2], 2, 2])
    even, odd = tl.split(pairs)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _bounded(begin, end, num_entries):
    """Return two words of `starts` as int32 with 0 <= begin <= end <= num_entries."""
    begin = tl.minimum(begin, num_entries.to(tl.uint32))
    end = tl.maximum(tl.minimum(end, num_entries.to(tl.uint32)), begin)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _patch_plainly(words, group, begin, end, entries_ptr):
    """Return the words [A, B, C, 8] of each group with the escapes of its tile in place; see `_patch`."""
    inside = (group >= 0) & (group < _GROUPS)
    is_raw = inside & (end - begin == _RAW_ENTRIES)
    place = tl.arange(0, 8)[None, None, None, :]
    raw = entries_ptr + (begin + group * 8)[:, :, :, None] + place
    words = tl.where(
        is_raw[:, :, :, None], tl.load(raw, mask=is_raw[:, :, :, None], other=0), words
    )
    count = tl.where(is_raw | ~inside, 0, tl.minimum(end - begin, _MAX_ESCAPES))
    most = tl.max(count, axis=None)
    i = 0
    while i < most:
        is_one = i < count
        entry = tl.load(entries_ptr + begin + i, mask=is_one, other=0)
        is_here = is_one & ((entry >> 20).to(tl.int32) == group)
        entry = entry[:, :, :, None]
        is_odd = ((entry >> 16) & 1) == 1
        low, high = words & 0xFFFF, words & 0xFFFF0000
        patched = tl.where(is_odd, low | (entry << 16), high | (entry & 0xFFFF))
        is_word = ((entry >> 17) & 7).to(tl.int32) == place
        words = tl.where(is_here[:, :, :, None] & is_word, patched, words)
        i += 1
    return words


@triton.jit
def _patch(a, b, c, d, e, f, g, h, group, begin, end, entries_ptr, FORM: tl.constexpr, PACK: tl.constexpr):  # fmt: skip
    """Return the 8 words [A, B, C] of each group with the escapes of its tile in place.

    Args:
        group: int32 [A, B, C], the group's number in its tile: 8 * row + group of the row; any number outside 0..511
            if its tile is another one.
        begin, end: int32 [A, B, C] or broadcast to it, from `_bounded`: entries of its tile.
        entries_ptr: uint32.
        PACK: groups, 1 or 4, of a thread that are looked at together; if 4, they must lie in one tile, or the
            kernel is stopped.
    """
    if FORM == _PLAIN:
        A: tl.constexpr = a.shape[0]
        B: tl.constexpr = a.shape[1]
        C: tl.constexpr = a.shape[2]
        words = tl.join(
            tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
        )
        group, begin = tl.broadcast(group, begin)
        group, end = tl.broadcast(group, end)
        group = tl.broadcast_to(group, (A, B, C))
        begin = tl.broadcast_to(begin, (A, B, C))
        end = tl.broadcast_to(end, (A, B, C))
        words = tl.reshape(words, [A, B, C, 8])
        words = _patch_plainly(words, group, begin, end, entries_ptr)
        evens, odds = tl.split(tl.reshape(words, [A, B, C, 4, 2]))
        a, c, e, g = _split_four(evens)
        b, d, f, h = _split_four(odds)
        return a, b, c, d, e, f, g, h
    else:
        address = entries_ptr.to(tl.uint64)
        return tl.inline_asm_elementwise(
            _PATCH_4 if PACK == 4 else _PATCH_1,
            _REGISTERS_4 if PACK == 4 else _REGISTERS_1,
            [a, b, c, d, e, f, g, h, group, begin, end, address],
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
            True,
            PACK,
        )


@triton.jit
def _round(value):
    """Return FP32 rounded to BF16 (nearest, ties to even) as bits; done by hand, because the interpreter truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, nearest, (bits >> 16) | 0x40).to(tl.uint16)
