"""The memory of each rank: weights in BF16 and compressed, scratch, and the rest for the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_dfloat.checkpoint.names import innermost_block
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.auto import (
    Candidate,
    bytes_for,
    choose,
    layer_of,
    layers_of,
    multiplied,
    turn_of,
)
from vllm_dfloat.plan.byte_sizes import GIB
from vllm_dfloat.plan.caches import pages_of_rank
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.kv_cache import KVCache, group_layers
from vllm_dfloat.plan.layout_sizes import AUTO, Codes, size_of
from vllm_dfloat.plan.offload import BlockWeight, on_host
from vllm_dfloat.plan.rotary import rotary_bytes
from vllm_dfloat.plan.scratch import Layers, Scratch
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.weights import Weight

RESERVE = GIB  # assumed: CUDA context, libraries, NCCL, CUDA graphs
BLOCK_SIZE, LATENT_BLOCK_SIZE = 16, 64  # tokens per block of KV cache, by default on a GPU
LOGITS_COPIES = 3  # assumed: FP32 copies of the logits that sampling holds at once


@dataclass(frozen=True)
class Rank:
    """The ranks of one pipeline stage, which are alike; all in bytes but `stage` and `layers`.

    Attributes:
        bf16_weights, dfloat11_weights: the parameters as vLLM holds them.
        bf16_towers, dfloat11_towers: those of them that are not the language model's.
        compressed_numel, compressed_bytes: of the weights that are compressed.
        scratch: the buffers that layers are decoded into.
        largest: the largest compressed layer, as BF16.
        overhead: everything else; of DFloat11 too if `whole_head` is 0.
        whole_head: the LM head where slabs of it are not proven: decoded for the time of a product.
        unproven_overhead: everything else in DFloat11 if that happens.
        bf16_host, dfloat11_host: those of the weights that lie in host memory.
        bf16_buffers, dfloat11_buffers: of the GPU, into which they are copied ahead of use.
        fast: the layers that "auto" holds in the fast layout.
    """

    stage: int
    layers: range
    bf16_weights: int
    dfloat11_weights: int
    bf16_towers: int
    dfloat11_towers: int
    compressed_numel: int
    compressed_bytes: int
    scratch: int
    largest: int
    overhead: int
    whole_head: int
    unproven_overhead: int
    bf16_host: int = 0
    dfloat11_host: int = 0
    bf16_buffers: int = 0
    dfloat11_buffers: int = 0
    fast: frozenset[str] = frozenset()

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.compressed_bytes / max(1, self.compressed_numel)

    @property
    def bf16_on_gpu(self) -> int:
        """Bytes of the GPU that the weights take in BF16."""
        return self.bf16_weights - self.bf16_host + self.bf16_buffers

    @property
    def dfloat11_on_gpu(self) -> int:
        """Bytes of the GPU that the weights take, compressed."""
        return self.dfloat11_weights - self.dfloat11_host + self.dfloat11_buffers

    @property
    def loading_peak(self) -> int:
        """A bound while loading DFloat11: what is held in the end, and two layers or, after the last, the buffers."""
        held = self.dfloat11_weights - self.dfloat11_host + self.scratch
        return held + max(2 * self.largest, self.dfloat11_buffers)


def split_layers(num_layers: int, pp: int) -> list[range]:
    """Return which layers each pipeline stage runs: remaining layers go to the stages before the last.

    Raises:
        UnsupportedError: fewer layers than stages.
    """
    if num_layers < pp:
        raise UnsupportedError(f"--pp {pp}: the model has {num_layers} layers. Give fewer stages.")
    counts = [num_layers // pp] * pp
    for i in range(num_layers % pp):
        counts[-2 - i] += 1
    starts = [sum(counts[:i]) for i in range(pp)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def ranks_of(
    config: ModelConfig, weights: Sequence[Weight], settings: Settings, codes: Codes
) -> list[Rank]:
    """Return the memory of the ranks of each pipeline stage.

    Args:
        codes: what is known of the weights' values.

    Raises:
        UnsupportedError: the model cannot be cut into so many parts.
    """
    if config.heads % settings.tp:
        raise UnsupportedError(
            f"--tp {settings.tp}: {config.heads} attention heads, which that many ranks cannot share "
            "evenly. Give another --tp, and --pp for the rest of the GPUs."
        )
    overlaps = any("experts" in weight.name for weight in weights)  # on a stream of their own
    slots = settings.slots or (2 if overlaps else 1)
    ranks = []
    for stage, layers in enumerate(split_layers(config.num_layers, settings.pp)):
        held = [w for w in weights if w.is_on_stage(stage, layers, settings.pp)]
        rank = _rank(config, held, settings, codes, stage, layers, slots)
        if settings.layout == AUTO:
            fast = _fast(config, held, settings, codes, rank)
            rank = _rank(config, held, settings, codes, stage, layers, slots, fast)
        ranks.append(rank)
    return ranks


def _rank(
    config: ModelConfig,
    held: Sequence[Weight],
    settings: Settings,
    codes: Codes,
    stage: int,
    layers: range,
    slots: int,
    fast: frozenset[str] = frozenset(),
) -> Rank:
    bf16 = dfloat11 = bf16_towers = dfloat11_towers = numel = coded = largest = 0
    experts: dict[str, int] = {}  # BF16 bytes of the tensors of a layer of experts
    compressed = Layers()
    in_blocks: list[BlockWeight] = []
    for weight in held:
        rows, cols = weight.shape_of_rank(settings.tp, settings.expert_parallel, settings.dp)
        plain = kept = weight.itemsize * rows * cols
        if weight.is_compressed:
            packed = size_of(_layout(settings, weight, fast), weight, rows, cols, codes)
            kept = packed.num_bytes
            compressed.add(weight, (rows, cols), packed, stage == settings.pp - 1)
            if module := weight.expert_layer:
                experts[module] = experts.get(module, 0) + plain
            largest = max([largest, plain, *experts.values()] if module else [largest, plain])
            if not packed.is_raw:
                numel, coded = numel + rows * cols, coded + packed.num_bytes
        bf16, dfloat11 = bf16 + plain, dfloat11 + kept
        if weight.layer >= 0:
            in_blocks.append(_in_block(weight, plain, kept, layers))
        if weight.is_of_tower:
            bf16_towers, dfloat11_towers = bf16_towers + plain, dfloat11_towers + kept
    scratch = compressed.scratch(settings.granularity == "block", slots, settings.slab)
    overhead, unproven = _overheads(config, settings, layers, scratch)
    host = on_host(in_blocks, settings.cpu_offload, settings.prefetch)
    return Rank(
        stage, layers, bf16, dfloat11, bf16_towers, dfloat11_towers, numel, coded, scratch.held, largest, overhead,
        scratch.whole_head, unproven,
        host.bf16, host.dfloat11, host.bf16_buffers, host.dfloat11_buffers, fast,
    )  # fmt: skip


def _in_block(weight: Weight, plain: int, kept: int, layers: range) -> BlockWeight:
    """Return a weight of `plain` bytes in BF16 and `kept` in DFloat11 as offloading sees it."""
    turn = -1 if weight.is_of_tower else weight.layer - layers.start
    name = weight.name.removeprefix(innermost_block(weight.name)).lstrip(".")
    return BlockWeight(plain, kept, weight.is_compressed, weight.cols == 1, name, turn)


def _overheads(
    config: ModelConfig, settings: Settings, layers: range, scratch: Scratch
) -> tuple[int, int]:
    """Return the bytes of everything else, and those in DFloat11 if the LM head is decoded whole."""
    if settings.overhead is not None:
        return settings.overhead, settings.overhead
    fixed, most = RESERVE + rotary_bytes(config, layers), activation_bytes(config, settings)
    logits = 2 * settings.num_seqs * config.vocab
    with_head = scratch.whole_head + logits if scratch.whole_head else 0
    return fixed + most, fixed + max(most, with_head)


def _layout(settings: Settings, weight: Weight, fast: frozenset[str]) -> str:
    if settings.layout != AUTO:
        return settings.layout
    return "fast" if layer_of(weight) in fast else "packed"


def _fast(
    config: ModelConfig, held: Sequence[Weight], settings: Settings, codes: Codes, packed: Rank
) -> frozenset[str]:
    """Return the layers of a rank that "auto" holds in the fast layout, given its plan with all of them packed."""
    length = settings.max_model_len or config.context
    cache = kv_cache_of(config, settings)
    wanted = settings.kv_cache_memory
    if wanted is None:
        tokens = settings.tokens_of_auto(config.context)
        wanted = bytes_for(tokens, cache, packed.layers, length)
    taken = packed.dfloat11_on_gpu + packed.scratch
    taken += packed.unproven_overhead  # the head may be needed whole
    limit = settings.requested if settings.kv_cache_memory is None else settings.gpu_memory
    tensors = []
    for weight in multiplied(held):
        shape = weight.shape_of_rank(settings.tp, settings.expert_parallel, settings.dp)
        sizes = [size_of(name, weight, *shape, codes).num_bytes for name in ("fast", "packed")]
        turn = turn_of(weight, shape, settings.decodes_all)
        tensors.append(Candidate(layer_of(weight), turn, max(0, sizes[0] - sizes[1])))
    return choose(layers_of(tensors), limit - taken - wanted)


def activation_bytes(config: ModelConfig, settings: Settings) -> int:
    """Return an estimate of the largest activations: of an MLP for a whole batch, or the logits for sampling."""
    width = config.widest("intermediate_size", 4 * config.hidden)
    mlp = settings.batched_tokens * 2 * (2 * config.hidden + 3 * width // settings.tp)
    logits = settings.num_seqs * config.vocab * (2 + 4 * LOGITS_COPIES)
    return max(mlp, logits)


def kv_cache_of(config: ModelConfig, settings: Settings) -> KVCache:
    """Return the shape of the KV cache on each rank."""
    size = settings.block_size or (LATENT_BLOCK_SIZE if config.latent else BLOCK_SIZE)
    pages = pages_of_rank(
        config.caches, settings.tp, size, settings.kv_cache_dtype,
        settings.mamba_ssm_cache_dtype, settings.prefix_caching,
    )  # fmt: skip
    return KVCache(group_layers(pages), settings.batches * settings.batched_tokens)
