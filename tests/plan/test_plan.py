"""The arithmetic of a plan, against numbers computed by hand and the encoder's output."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import SHIPPED, VECTORS

from vllm_dfloat.codec.encode import encode
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan import scratch
from vllm_dfloat.plan.architectures import known_weights
from vllm_dfloat.plan.config import read_model_config
from vllm_dfloat.plan.kv_cache import EVERYTHING, KVCache, Pages, Reach, group_layers
from vllm_dfloat.plan.memory import split_layers
from vllm_dfloat.plan.packed_size import DESC_BYTES, mean_code_bits, packed_size
from vllm_dfloat.plan.plan import make_plan
from vllm_dfloat.plan.settings import Settings

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
GIB = 1 << 30
# (hidden, intermediate, layers, heads); all have 8 KV heads of 128 and 128256 tokens.
LLAMAS = {
    "Llama-3.1-405B": (16384, 53248, 126, 128, 405_853_388_800),
    "Llama-3.3-70B": (8192, 28672, 80, 64, 70_553_706_496),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8_030_261_248),
}


def config_of(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


@pytest.mark.parametrize("name", LLAMAS)
def test_parameters_are_those_worked_out_by_hand(name: str) -> None:
    hidden, width, layers, heads, published = LLAMAS[name]
    block = 2 * heads * 128 * hidden + 2 * 8 * 128 * hidden + 3 * width * hidden + 2 * hidden
    by_hand = 2 * 128256 * hidden + layers * block + hidden
    weights = known_weights(read_model_config(CONFIGS / f"{name}.json"))
    assert sum(weight.numel for weight in weights) == by_hand == published


def test_each_of_eight_ranks_of_the_405b_holds_an_eighth_of_the_matrices_and_all_norms() -> None:
    plan = make_plan(config_of("Llama-3.1-405B"), Settings(tp=8))
    (rank,) = plan.ranks
    norms = (2 * 126 + 1) * 16384
    assert rank.bf16_weights == 2 * ((405_853_388_800 - norms) // 8 + norms)
    assert (
        plan.kv_bytes_per_token(rank) == 126 * 2 * 128 * 2
    )  # one KV head, keys and values, 2 bytes
    gate_up, head = 2 * 6656 * 16384, 16032 * 16384
    assert rank.scratch == 2 * gate_up + 4 * gate_up // 2048
    assert rank.whole_head == 2 * head + 4 * head // 2048  # an eighth of the LM head
    assert not plan.bf16.fits
    assert plan.dfloat11.fits


def test_more_ranks_than_kv_heads_hold_copies_of_them() -> None:
    ranks = [make_plan(config_of("Llama-3.3-70B"), Settings(tp=tp)) for tp in (8, 16)]
    costs = [plan.kv_bytes_per_token(plan.ranks[0]) for plan in ranks]
    assert costs[0] == costs[1] == 80 * 2 * 128 * 2


def test_pipeline_stages_share_the_parameters() -> None:
    plan = make_plan(config_of("Llama-3.3-70B"), Settings(tp=1, pp=3))
    assert sum(rank.bf16_weights for rank in plan.ranks) == 2 * 70_553_706_496
    assert [len(rank.layers) for rank in plan.ranks] == [27, 27, 26]


@pytest.mark.parametrize(
    ("layers", "pp", "counts"),
    [(126, 4, [31, 32, 32, 31]), (5, 2, [3, 2]), (4, 4, [1, 1, 1, 1]), (7, 4, [2, 2, 2, 1])],
)
def test_layers_left_over_go_to_the_stages_before_the_last(layers, pp, counts) -> None:
    stages = split_layers(layers, pp)
    assert [len(stage) for stage in stages] == counts
    assert [layer for stage in stages for layer in stage] == list(range(layers))


@pytest.mark.parametrize("shape", [(256, 256), (4096, 512), (300, 70), (3, 5)])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_packed_size_is_that_of_the_encoder(shape: tuple[int, int], std: float) -> None:
    values = np.random.default_rng(7).normal(0, std, shape).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    packed = encode(bits)
    counts = np.bincount(bits.reshape(-1) >> 7 & 0xFF, minlength=256)
    size = packed_size(*shape, mean_code_bits(counts))
    assert size.is_raw == packed.is_raw
    assert size.num_bytes - DESC_BYTES == pytest.approx(packed.num_bytes, rel=0.003)


def test_windows_are_grouped_so_that_all_groups_have_as_many_layers() -> None:
    reaches = [Reach(1024) if (i + 1) % 6 else EVERYTHING for i in range(62)]  # Gemma 3 27B
    groups = group_layers([Pages(i, 100, 16, reach) for i, reach in enumerate(reaches)])
    assert [len(group.layers) for group in groups] == [9, 9, 9, 9, 8, 8, 10]
    cache = KVCache(groups, in_flight=2048)
    assert cache.block_bytes(range(62)) == 1000
    # a window's last 1023 tokens and 2048 in flight: 192 blocks and one more, six times; and all 8192 tokens
    assert cache.blocks_per_request(8192) == 6 * 193 + 512


def test_longest_context_is_the_last_that_fits() -> None:
    plan = make_plan(config_of("Llama-3.1-8B"), Settings(gpu_memory=24 * GIB))
    longest = plan.dfloat11.longest
    for length, fits in ((longest, True), (longest + 1, False)):
        settings = Settings(gpu_memory=24 * GIB, max_model_len=length)
        assert make_plan(config_of("Llama-3.1-8B"), settings).dfloat11.fits is fits


def test_fp8_cache_holds_twice_the_tokens() -> None:
    plans = [
        make_plan(config_of("Llama-3.1-8B"), Settings(gpu_memory=24 * GIB, kv_cache_dtype=dtype))
        for dtype in ("bfloat16", "fp8")
    ]
    assert plans[1].dfloat11.num_blocks in (2 * plans[0].dfloat11.num_blocks + i for i in (0, 1))


def test_a_block_at_a_time_needs_scratch_for_all_its_layers() -> None:
    settings = Settings(granularity="block", tp=8)
    plan = make_plan(config_of("Llama-3.1-405B"), settings)
    block = 2 * 16 * 128 * 16384 + 2 * 128 * 16384 + 3 * 6656 * 16384
    assert plan.ranks[0].scratch == 2 * block + 4 * block // 2048


def test_an_unknown_architecture_is_planned_from_its_files(tmp_path: Path) -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    (tmp_path / "model.safetensors").symlink_to(SHIPPED / "model.safetensors")
    for settings in (Settings(), Settings(tp=2), Settings(pp=2)):
        guessed, known = make_plan(str(tmp_path), settings), make_plan(str(SHIPPED), settings)
        assert guessed.parameters == known.parameters
        for one, other in zip(guessed.ranks, known.ranks, strict=True):
            assert one.bf16_weights == other.bf16_weights
            # separate tables for q, k and v, and for gate and up
            assert one.dfloat11_weights == pytest.approx(other.dfloat11_weights, rel=0.03)
        assert "Unheard is not known" in guessed.notes[0]


def test_an_official_checkpoint_is_planned_with_the_codes_of_its_units() -> None:
    plan = make_plan(str(VECTORS / "llama-tiny-df11"), Settings())
    matrices = 2 * 256 * 256 + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 288 * 256)
    assert plan.ranks[0].bf16_weights == 2 * (matrices + 5 * 256)
    assert "measured" in plan.code_bits


def test_experts_are_compressed_and_their_routers_stay_bf16(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "Llama-3.1-8B.json").read_text())
    changes = dict(architectures=["MixtralForCausalLM"], vocab_size=32000, num_local_experts=8)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    plan = make_plan(str(tmp_path), Settings(gpu_memory=141 * GIB))
    assert plan.parameters == 46_702_792_704  # Mixtral 8x7B
    of_experts = 8 * 3 * 4096 * 14_336
    others = 32 * (2 * 4096 + 2 * 1024) * 4096 + 2 * 32000 * 4096
    (rank,) = plan.ranks
    assert rank.compressed_numel == others + 32 * of_experts
    # One layer of experts is decoded at a time; other layers on a second stream. 4 bytes a tile are for its status.
    second_stream, a_flag_each = (4096 + 2 * 1024) * 4096, 2048  # qkv: the LM head is on the first
    assert rank.scratch == (of_experts + a_flag_each + second_stream) * 2050 // 1024
    assert rank.largest == 2 * of_experts
    assert any("routers of experts stay BF16" in note for note in plan.notes)


def test_ranks_share_experts_whole_or_in_parts() -> None:
    # Bug caught: 128 experts on 3 ranks counted as 42 each.
    model = config_of("Qwen3-30B-A3B")
    in_parts, whole = (
        make_plan(model, Settings(tp=4, expert_parallel=flag)).ranks[0] for flag in (False, True)
    )
    assert in_parts.dfloat11_weights == whole.dfloat11_weights
    config = read_model_config(Path(model))
    weight = next(one for one in known_weights(config) if one.num_experts)
    assert weight.shape_of_rank(3, expert_parallel=True) == (2 * 768, 43 * 2048)
    with pytest.raises(UnsupportedError, match="--tp 5: "):
        weight.shape_of_rank(5)


def test_engines_of_data_parallelism_share_routed_experts_and_nothing_else() -> None:
    model = config_of("Qwen3-30B-A3B")
    settings = [Settings(), Settings(dp=4), Settings(dp=4, expert_parallel=True), Settings(tp=4)]
    one, in_parts, whole, tensor = (make_plan(model, each).ranks[0] for each in settings)
    of_experts = 2 * 48 * 128 * 3 * 768 * 2048
    assert in_parts.bf16_weights == whole.bf16_weights == one.bf16_weights - of_experts * 3 // 4
    assert in_parts.scratch == whole.scratch < one.scratch
    plans = [make_plan(model, each) for each in settings]
    assert plans[1].kv_bytes_per_token(in_parts) == plans[0].kv_bytes_per_token(one)
    assert tensor.bf16_weights < in_parts.bf16_weights
    weight = next(one for one in known_weights(plans[0].config) if one.num_experts)
    assert weight.shape_of_rank(2, dp=4) == (2 * 96, 128 * 2048)
    assert weight.shape_of_rank(2, expert_parallel=True, dp=3) == (2 * 768, 22 * 2048)
    with pytest.raises(UnsupportedError, match=r"--tp 2 times --dp 5: .* 10 ranks"):
        weight.shape_of_rank(2, dp=5)


def test_a_fixed_cache_must_fit_beside_the_weights() -> None:
    for cache, fits in ((11 * GIB, True), (12 * GIB, False)):
        settings = Settings(gpu_memory=24 * GIB, kv_cache_memory=cache, overhead=GIB, slab=0)
        plan = make_plan(config_of("Llama-3.1-8B"), settings)
        assert plan.dfloat11.fits is fits  # weights of 10.1 GiB, scratch of 1.0 GiB
        assert plan.dfloat11.num_blocks == cache // (16 * 131072)


def test_an_lm_head_that_is_not_held_counts_as_a_peak_and_not_at_all_where_slabs_are_proven() -> (
    None
):
    settings = Settings(gpu_memory=24 * GIB)
    plan = make_plan(config_of("Llama-3.1-8B"), settings)
    (rank,) = plan.ranks
    gate_up, head = 2 * 14_336 * 4096, 128_256 * 4096
    assert rank.scratch == 2 * gate_up + 4 * gate_up // 2048
    assert rank.whole_head == 2 * head + 4 * head // 2048
    logits = 128_256 * 256
    assert rank.unproven_overhead - rank.overhead == rank.whole_head + 2 * logits - 14 * logits
    assert plan.proven.kv_bytes[0] - plan.dfloat11.kv_bytes[0] == rank.unproven_overhead - rank.overhead  # fmt: skip
    assert f"{plan.proven.tokens:,} KV tokens" in " ".join(plan.notes)
    off = make_plan(config_of("Llama-3.1-8B"), Settings(gpu_memory=24 * GIB, slab=0))
    assert off.ranks[0].scratch == rank.whole_head
    assert off.ranks[0].whole_head == 0
    assert off.dfloat11.tokens < plan.dfloat11.tokens < plan.proven.tokens
    assert off.dfloat11 == off.proven


def test_only_the_last_stage_needs_scratch_for_the_lm_head() -> None:
    # Bug caught: scratch for the embedding, whose rows are looked up without any.
    first, last = make_plan(config_of("gemma-3-27b-it"), Settings(pp=2, slab=0)).ranks  # tied
    gate_up, head = 2 * 21_504 * 5376, 262_208 * 5376
    assert first.scratch == 2 * gate_up + 4 * gate_up // 2048
    assert last.scratch == 2 * head + 4 * head // 2048


def test_a_slab_is_as_large_as_what_other_layers_need_and_no_smaller_than_the_default() -> None:
    from vllm_dfloat.kernels.configs import DEFAULT

    assert DEFAULT.slab_bytes == scratch.DEFAULT_SLAB
    layers = scratch.Layers(largest=1000, head=(128_256, 4096, 2 * 128_256 * 4096))
    held = layers.scratch(False, 1, None)
    assert scratch.DEFAULT_SLAB // 2 < held.held <= scratch.DEFAULT_SLAB * 1025 // 1024
    assert held.whole_head == 2 * 128_256 * 4096
    small = scratch.Layers(largest=1000, head=(512, 64, 2 * 512 * 64))
    assert small.scratch(False, 2, None) == scratch.Scratch(2 * 512 * 64 + 1000, 0)
    assert small.scratch(False, 1, 1 << 14).whole_head
