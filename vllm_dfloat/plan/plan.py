"""The plan: what one way of serving a model needs, in BF16 and compressed, and whether it fits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE, is_dfloat11
from vllm_dfloat.checkpoint.quantized import refuse_quantized_files
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan.config import ModelConfig, config_file, read_model_config
from vllm_dfloat.plan.kv_cache import KVCache
from vllm_dfloat.plan.memory import Rank, Settings, kv_cache_of, ranks_of
from vllm_dfloat.plan.packed_size import ASSUMED_CODE_BITS
from vllm_dfloat.plan.shapes import RULES, known_weights
from vllm_dfloat.plan.stored import (
    MeasuredBits,
    Tensors,
    check_shapes,
    read_tensors,
    weights_of_files,
)
from vllm_dfloat.plan.weights import Weight

MAX_NAMED = 3


@dataclass(frozen=True)
class Outcome:
    """What comes of one way to hold the weights.

    Attributes:
        kv_bytes: per pipeline stage, left for the KV cache on each rank; negative where there is less than nothing.
        num_blocks: blocks of KV cache, as many as the poorest rank has.
        tokens: KV tokens as vLLM reports them.
        longest: the longest request that fits, up to the model's context; 0 if none does.
        fits: whether vLLM starts and a request of --max-model-len tokens fits; without it, of one token.
    """

    kv_bytes: tuple[int, ...]
    num_blocks: int
    tokens: int
    longest: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Everything that the report and the picture show.

    Attributes:
        model: as the user named it.
        parameters: of the whole model.
        ranks: per pipeline stage.
        kv_cache: its shape on a rank.
        code_bits: what is known of the codes, in words.
        notes: what else the reader must know.
    """

    model: str
    config: ModelConfig
    settings: Settings
    parameters: int
    ranks: list[Rank]
    kv_cache: KVCache
    bf16: Outcome
    dfloat11: Outcome
    code_bits: str
    notes: tuple[str, ...]

    def kv_bytes_per_token(self, rank: Rank) -> float:
        """Return what a token costs on a rank; a layer with a window counts fully, though it forgets."""
        layers = sum(
            layer in rank.layers for group in self.kv_cache.groups for layer in group.layers
        )
        return layers * self.kv_cache.page_bytes / self.kv_cache.block_size


def make_plan(model: str, settings: Settings, code_bits: float | None = None) -> Plan:
    """Plan how `model` is served.

    Args:
        model: a folder, a config.json, or a hub id.
        code_bits: bits per weight of the exponents' codes; None to measure them, or to assume them without weights.

    Raises:
        FormatError: config.json or a file of weights is missing or damaged, or they contradict each other.
        UnsupportedError: quantized weights, an architecture that is not known without its weights, or ranks that
            cannot share it.
    """
    file = config_file(model)
    config = read_model_config(file)
    # Files beside a config of another name belong to another model.
    tensors = read_tensors(file.parent) if file.name == CONFIG_FILE else None
    refuse_quantized_files(file.parent, tensors or {})
    weights, notes = _weights(config, tensors, file.parent)
    bits, told = _code_bits(file.parent, tensors, code_bits)
    ranks = ranks_of(config, weights, settings, bits)
    cache = kv_cache_of(config, settings)
    if (settings.max_model_len or 0) > config.context:
        raise UnsupportedError(
            f"--max-model-len {settings.max_model_len}: the model was made for {config.context} tokens. "
            "Give at most as many."
        )
    if any("experts" in weight.name for weight in weights):
        notes.append("experts and their routers stay BF16")
    if any(config.windows):
        notes.append(
            "layers with a window keep only its tokens: KV tokens are counted as vLLM does"
        )
    bf16, dfloat11 = (
        _outcome(ranks, cache, settings, config.context, compressed=c) for c in (False, True)
    )
    parameters = sum(weight.numel for weight in weights)
    return Plan(
        model, config, settings, parameters, ranks, cache, bf16, dfloat11, told, tuple(notes)
    )


def _weights(
    config: ModelConfig, tensors: Tensors | None, folder: Path
) -> tuple[list[Weight], list[str]]:
    """Return all weights, and remarks on where their shapes come from."""
    if tensors is None:
        return known_weights(config), ["shapes from config.json alone"]
    if config.architecture not in RULES:
        if is_dfloat11(folder):
            raise UnsupportedError(
                f"{folder}: architecture {config.architecture} in the DFloat11 format, which stores no shapes. "
                "Plan with the folder of the BF16 original."
            )
        note = f"{config.architecture} is not known: every matrix of the files is split evenly, an estimate"
        return weights_of_files(tensors, config), [note]
    weights = known_weights(config)
    if is_dfloat11(folder):
        return weights, ["shapes from config.json; the DFloat11 format stores none"]
    left_out = check_shapes(weights, tensors, folder)
    notes = ["shapes checked against the files' headers"]
    if left_out:
        named = ", ".join(left_out[:MAX_NAMED]) + (", ..." if len(left_out) > MAX_NAMED else "")
        notes.append(f"{len(left_out)} tensors of the files are not counted: {named}")
    if config.tied and "lm_head.weight" in tensors:
        notes.append(
            "an LM head is stored although config.json ties it: not counted, vLLM may hold it"
        )
    return weights, notes


def _code_bits(
    folder: Path, tensors: Tensors | None, given: float | None
) -> tuple[Callable[[Weight], float], str]:
    if given is not None:
        return (lambda weight: given), f"{given:g} bits per exponent, given"
    if tensors is None:
        told = f"{ASSUMED_CODE_BITS:g} bits per exponent, assumed (typical of trained weights)"
        return (lambda weight: ASSUMED_CODE_BITS), told
    return MeasuredBits(folder, tensors), "bits per exponent measured on a sample of every matrix"


def _outcome(
    ranks: list[Rank],
    cache: KVCache,
    settings: Settings,
    context: int,
    compressed: bool,
) -> Outcome:
    left, blocks, loads = [], [], True
    for rank in ranks:
        held = rank.dfloat11_weights + rank.scratch if compressed else rank.bf16_weights
        free = settings.requested - held - rank.overhead
        loads &= settings.kv_cache_memory is not None or free > 0
        if compressed:
            loads &= rank.loading_peak <= settings.gpu_memory
        if settings.kv_cache_memory is not None:  # which --gpu-memory-utilization does not limit
            free = settings.kv_cache_memory
            loads &= held + rank.overhead + free <= settings.gpu_memory
        left.append(free)
        if per_block := cache.block_bytes(rank.layers):
            blocks.append(max(0, left[-1]) // per_block)
    num_blocks = min(blocks)
    if not loads:
        return Outcome(tuple(left), num_blocks, 0, 0, False)
    tokens = cache.capacity(num_blocks, settings.max_model_len or context)
    longest = cache.longest(num_blocks, context)
    return Outcome(
        tuple(left), num_blocks, tokens, longest, longest >= (settings.max_model_len or 1)
    )
