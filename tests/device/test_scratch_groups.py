"""When a group must be decoded into the shared buffer, and when the buffer still holds it."""

import torch

from vllm_dfloat.device.scratch import ScratchArena

CPU = torch.device("cpu")


def decodes(arena: ScratchArena, calls: list[tuple[str, int]], slot: str = "main") -> list[bool]:
    """Return, for each call (group, member), whether the group had to be decoded."""
    return [arena.take_for_group(CPU, 4096, group, member, slot)[1] for group, member in calls]


def test_a_group_is_decoded_once_per_pass() -> None:
    arena = ScratchArena()
    one_pass = [(group, member) for group in "ab" for member in range(3)]
    for _ in range(3):
        assert decodes(arena, one_pass) == [True, False, False, True, False, False]


def test_a_model_of_one_group_decodes_it_in_every_pass() -> None:
    # Bug caught: a graph captured after warm-up that has no decode, and reads old contents of the buffer.
    arena = ScratchArena()
    for _ in range(3):
        assert decodes(arena, [("a", 0), ("a", 1)]) == [True, False]


def test_members_may_come_in_any_order_and_be_left_out() -> None:
    arena = ScratchArena()
    assert decodes(arena, [("a", 2), ("a", 0), ("b", 1), ("a", 1)]) == [True, False, True, True]
    assert decodes(arena, [("a", 2), ("a", 2)]) == [False, True]  # a pass that was broken off


def test_another_layer_in_the_buffer_ends_a_group() -> None:
    arena = ScratchArena()
    assert decodes(arena, [("a", 0)]) == [True]
    arena.take(CPU, 2048, "main")  # an LM head, say
    assert decodes(arena, [("a", 1)]) == [True]


def test_slots_hold_groups_of_their_own() -> None:
    arena = ScratchArena()
    assert decodes(arena, [("a", 0)]) == [True]
    assert decodes(arena, [("b", 0), ("b", 1)], "beside") == [True, False]
    assert decodes(arena, [("a", 1)]) == [False]


def test_groups_of_a_block_lie_beside_each_other() -> None:
    # Bug caught: a block with matrices in two layouts decodes one of its groups twice a pass.
    arena = ScratchArena()
    one_pass = [("block", 0, 0), ("block", 2, 2), ("block", 3, 2), ("block", 1, 0)]
    for _ in range(3):
        found = [arena.take_for_group(CPU, 4096, b, m, "main", g)[1] for b, m, g in one_pass]
        assert found == [True, True, False, False]


def test_a_matrix_used_without_decoding_begins_a_pass_as_well() -> None:
    # Bug caught: the only block of a model, of which few rows are multiplied without decoding. The first matrix that
    # was decoded in the last pass is another one, so this one seemed to be new in that pass, and kept old weights.
    arena = ScratchArena()
    arena.take(CPU, 2048, "main")  # partial sums
    arena.note_call(CPU, "a", 0, "main")
    assert decodes(arena, [("a", 1), ("a", 2)]) == [True, False]
    assert decodes(arena, [("a", 0), ("a", 1)]) == [True, False]
    arena.note_call(CPU, "a", 2, "main")  # without scratch
    assert decodes(arena, [("a", 0)]) == [True]


def test_what_one_slot_needs_does_not_enlarge_the_others() -> None:
    # Bug caught: a layer of experts, never decoded on the aux stream, would have taken its room there too.
    arena = ScratchArena()
    arena.require(CPU, 4096)
    arena.require(CPU, 1 << 20, ["main", "second microbatch"])
    arena.reserve(CPU, ["main", "aux", "second microbatch"])
    sizes = [arena.take(CPU, 0, slot)[0].numel() for slot in ("main", "aux", "second microbatch")]
    assert sizes == [1 << 20, 4096, 1 << 20]


def test_a_buffer_that_had_to_grow_holds_nothing() -> None:
    arena = ScratchArena()
    arena.take_for_group(CPU, 4096, "a", 0)
    (out, status), is_stale = arena.take_for_group(CPU, 8192, "a", 1)
    assert is_stale
    assert (out.numel(), status.numel()) == (8192, 4)
    arena.release()
    assert arena.take_for_group(CPU, 4096, "a", 2)[1]
