"""The plan: the memory for serving a model in BF16 and compressed, and whether it fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_dfloat.checkpoint.folder import CONFIG_FILE
from vllm_dfloat.checkpoint.hub import is_of_hub
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.plan.architectures import is_known, known_weights
from vllm_dfloat.plan.auto import layer_of
from vllm_dfloat.plan.config import ModelConfig, read_model_config
from vllm_dfloat.plan.guessed import weights_of_files
from vllm_dfloat.plan.hub import config_file
from vllm_dfloat.plan.kv_cache import KVCache
from vllm_dfloat.plan.layout_sizes import ASSUMED_ESCAPES, AUTO, Codes
from vllm_dfloat.plan.measured import MeasuredBits
from vllm_dfloat.plan.memory import Rank, kv_cache_of, ranks_of
from vllm_dfloat.plan.notes import (
    note_on_auto,
    notes_on,
    notes_on_given_options,
    notes_on_head,
    notes_on_idle_options,
    notes_on_shortage,
    notes_on_states,
)
from vllm_dfloat.plan.outcome import Outcome, bf16, outcome, proven, unproven
from vllm_dfloat.plan.packed_size import ASSUMED_CODE_BITS
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.stored import (
    Files,
    check_weights,
    read_files,
    stores_another_head,
)
from vllm_dfloat.plan.weights import Weight

MAX_NAMED = 3


@dataclass(frozen=True)
class Plan:
    """All that the report and the picture show.

    Attributes:
        model: as the user named it.
        parameters: of the whole model.
        compressed: number of parameters in compressed weights.
        ranks: per pipeline stage.
        dfloat11: if slabs of the LM head are not proven equal for every number of rows.
        proven: if they are.
        kv_cache: its shape on a rank.
        code_bits: where the bits of the codes come from, in words.
        notes: remarks for the reader.
        choice: those of them that say what layout "auto" chose.
    """

    model: str
    config: ModelConfig
    settings: Settings
    parameters: int
    compressed: int
    ranks: list[Rank]
    kv_cache: KVCache
    bf16: Outcome
    dfloat11: Outcome
    proven: Outcome
    code_bits: str
    notes: tuple[str, ...]
    choice: tuple[str, ...] = ()

    def kv_bytes_per_token(self, rank: Rank) -> float:
        """Return the bytes of a token on a rank; layers with a window count in full."""
        return self.kv_cache.bytes_per_token(rank.layers)


def make_plan(model: str, settings: Settings, code_bits: float | None = None) -> Plan:
    """Plan how `model` is served.

    Args:
        model: a folder, a config.json, or a hub id.
        code_bits: bits per weight of the exponents' codes; None to measure them, or to assume them without weights.

    Raises:
        FormatError: config.json or a file of weights is missing or damaged, or they contradict each other.
        UnsupportedError: quantized weights, an architecture without rules or weights, or ranks that cannot share
            the model.
    """
    file = config_file(model)
    config = read_model_config(file)
    files, notes = _files(model, file, config)
    if stores_another_head(files, config):
        config = replace(config, tied=False)
        notes.append(
            "an LM head of its own is stored although config.json ties it: vLLM holds both"
        )
    weights, told = _weights(config, files)
    notes += told
    codes, code_bits_told = _code_bits(files, code_bits)
    if settings.layout in ("fast", AUTO):
        code_bits_told += f"; {_escapes(files)} of weights escaped"
    ranks = ranks_of(config, weights, settings, codes)
    cache = kv_cache_of(config, settings)
    if (settings.max_model_len or 0) > config.context:
        raise UnsupportedError(
            f"--max-model-len {settings.max_model_len}: the model was made for {config.context} tokens. "
            "Give at most as many."
        )
    of_bf16, of_dfloat11, of_proven = (
        outcome(ranks, cache, settings, config.context, held) for held in (bf16, unproven, proven)
    )
    notes += notes_on_given_options(config) + notes_on(config, weights, files)
    notes += notes_on_states(cache)
    notes += notes_on_head(ranks, of_proven.tokens) + notes_on_idle_options(
        ranks, weights, settings
    )
    choice: list[str] = []
    if settings.layout == AUTO:
        choice = [
            note_on_auto(ranks, weights, settings, config),
            *notes_on_shortage(ranks, settings, config),
        ]
    return Plan(
        model, config, settings, sum(weight.numel for weight in weights),
        sum(weight.numel for weight in weights if weight.is_compressed),
        ranks, cache, of_bf16, of_dfloat11, of_proven, code_bits_told, (*notes, *choice), tuple(choice),
    )  # fmt: skip


def fast_layers(
    model: str, settings: Settings, stays_bf16: Callable[[str], bool] = lambda layer: False
) -> tuple[frozenset[str], str, list[str]]:
    """Return the layers that "auto" holds in the fast layout, by vLLM's names, a sentence on the choice, and warnings.

    It reads config.json and the headers of the files, and no weights. The settings are those of "auto". Layers of an
    architecture without rules have the names of their tensors in the files.

    Args:
        stays_bf16: (layer) -> whether the user wants it to stay so.

    Raises:
        FormatError, UnsupportedError: as `make_plan`.
    """
    file = config_file(model)
    config = read_model_config(file)
    files, _ = _files(model, file, config)
    if stores_another_head(files, config):
        config = replace(config, tied=False)
    weights = [
        replace(weight, is_compressed=weight.is_compressed and not stays_bf16(layer_of(weight)))
        for weight in _weights(config, files)[0]
    ]
    ranks = ranks_of(config, weights, settings, _code_bits(None, None)[0])
    fast = frozenset().union(*(rank.fast for rank in ranks))
    told = note_on_auto(ranks, weights, settings, config)
    return fast, told, notes_on_shortage(ranks, settings, config)


def _files(model: str, file: Path, config: ModelConfig) -> tuple[Files | None, list[str]]:
    """Return the contents of weight files beside config.json, if any, and a remark if they are ignored."""
    if file.name != CONFIG_FILE:  # files beside a config of another name belong to another model
        return None, []
    try:
        return read_files(file.parent, config), []
    except FormatError:
        if not is_of_hub(model):
            raise
        return None, ["the hub's cache holds a part of the weights only, so config.json alone counts"]  # fmt: skip


def _weights(config: ModelConfig, files: Files | None) -> tuple[list[Weight], list[str]]:
    """Return all weights, and remarks on the source of their shapes."""
    if files is None:
        return known_weights(config), ["shapes from config.json alone"]
    if not is_known(config.architecture):
        if files.is_dfloat11:
            raise UnsupportedError(
                f"{files.folder}: architecture {config.architecture} in the DFloat11 format, which stores no shapes. "
                "Plan with the folder of the BF16 original."
            )
        note = f"{config.architecture} is not known: every matrix of the files is split evenly over --tp, an estimate"
        return weights_of_files(files, config), [note]
    weights = known_weights(config)
    left_out = check_weights(weights, files)
    notes = ["shapes checked against the files' headers"]
    if files.is_dfloat11:
        notes = ["shapes from config.json, names checked against the files"]
    if left_out:
        named = ", ".join(left_out[:MAX_NAMED]) + (", ..." if len(left_out) > MAX_NAMED else "")
        notes.append(f"{len(left_out)} tensors of the files are not counted: {named}")
    return weights, notes


def _code_bits(files: Files | None, given: float | None) -> tuple[Codes, str]:
    if given is not None:
        return Codes(lambda weight: given), f"{given:g} bits per exponent, given"
    if files is None:
        told = f"{ASSUMED_CODE_BITS:g} bits per exponent, assumed (typical of trained weights)"
        return Codes(lambda weight: ASSUMED_CODE_BITS), told
    measured = MeasuredBits(files)
    return Codes(
        measured, measured.escapes
    ), "bits per exponent measured on a sample of every matrix"


def _escapes(files: Files | None) -> str:
    return "a measured share" if files else f"{100 * ASSUMED_ESCAPES:g} %, assumed,"
