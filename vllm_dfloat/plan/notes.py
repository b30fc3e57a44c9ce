"""Remarks that a reader of a plan needs beside its numbers."""

from collections.abc import Mapping

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.codec.fast_layout import MAX_BITS_PER_WEIGHT
from vllm_dfloat.plan.auto import layer_of
from vllm_dfloat.plan.byte_sizes import show_size
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.kv_cache import KVCache
from vllm_dfloat.plan.memory import Rank, kv_cache_of
from vllm_dfloat.plan.outcome import outcome, unproven
from vllm_dfloat.plan.settings import Settings
from vllm_dfloat.plan.stored import DTYPES, Files
from vllm_dfloat.plan.weights import Weight

_ROUTERS = (".gate", ".router", ".shared_expert_gate")


def notes_on(config: ModelConfig, weights: list[Weight], files: Files | None) -> list[str]:
    """Return remarks: on dtypes, on what stays BF16, and on what a plan leaves out."""
    notes = _of_dtype(config, files)
    whole, compressed = (
        sum((weight.numel + weight.padding) * weight.itemsize for weight in weights if weight.is_compressed >= wanted)
        for wanted in (False, True)
    )  # fmt: skip
    kept = _kept(weights)
    if kept:
        share = 100 * compressed / max(1, whole)
        notes.append(f"{share:.2f} % of all weight bytes are compressed: {kept} stay BF16")
    if any(weight.is_of_tower for weight in weights):
        notes.append("activations and cache of the tower are not counted: give --overhead for those")  # fmt: skip
    if config.has_reaches:
        notes.append(
            "layers with a window keep only its tokens: KV tokens are counted as vLLM does"
        )
    return notes


def notes_on_given_options(config: ModelConfig) -> list[str]:
    """Return a remark on options for serving in config.json, which an engine takes and a plan does not."""
    given = config.whole.entries.get("quantization_config")
    named = sorted({*given} - {"quant_method", CONFIG_KEY}) if isinstance(given, Mapping) else []
    if not named:
        return []
    flags = [f"--{name.replace('_', '-')}" for name in named if name != "ignore"]
    asked = f"; give {' '.join(flags)} here" if flags else ""
    ignored = "; layers of ignore are counted as compressed" if "ignore" in named else ""
    return [
        f"quantization_config of config.json sets {', '.join(named)} for serving, which a plan does not take over"
        f"{asked}{ignored}"
    ]


def notes_on_head(ranks: list[Rank], tokens: int) -> list[str]:
    """Return a remark on an LM head that the scratch does not hold; tokens: of KV cache if slabs are proven equal."""
    whole = max(rank.whole_head for rank in ranks)
    if not whole:
        return []
    return [
        "the LM head is multiplied in slabs for numbers of rows at which vLLM's start finds equal bits on the GPU; "
        f"for the others {show_size(whole)}, the whole head, are counted in other, for the time of a product. If there "
        f"are no others: {tokens:,} KV tokens"
    ]


def notes_on_idle_options(
    ranks: list[Rank], weights: list[Weight], settings: Settings
) -> list[str]:
    """Return a remark on each option that vLLM takes and that changes nothing for this model."""
    notes = []
    if settings.expert_parallel and not any("experts" in weight.name for weight in weights):
        notes.append("--enable-expert-parallel changes nothing: the model has no routed experts")
    prefetch = settings.prefetch
    if prefetch.group_size and not any(rank.bf16_host for rank in ranks):
        blocks = max(len(rank.layers) for rank in ranks)
        first = prefetch.group_size - prefetch.num_in_group + 1
        option = f"--offload-group-size {prefetch.group_size} puts nothing into host memory"
        if first > blocks:
            what = f"it begins with block {first} of a group, and a stage has {blocks} blocks"
        else:
            segments = ", ".join(sorted(prefetch.params))
            what = (
                f"no weight of the blocks it takes has a segment of --offload-params ({segments})"
            )
        notes.append(f"{option}: {what}")
    return notes


def note_on_auto(
    ranks: list[Rank], weights: list[Weight], settings: Settings, config: ModelConfig
) -> str:
    """Return a sentence on what layout "auto" has chosen."""
    fast = frozenset().union(*(rank.fast for rank in ranks))
    room = f"{settings.tokens_of_auto(config.context):,} tokens of KV cache"
    if settings.kv_cache_memory is not None:
        room = f"{settings.kv_cache_memory:,} bytes of KV cache"
    compressed = [weight for weight in weights if weight.is_compressed]
    if not compressed:
        return "auto: there is nothing to choose, since all matrices stay BF16"
    if not fast:
        return f"auto: all matrices packed, since with any of them fast there would be no room for {room}"
    count = sum(layer_of(weight) in fast for weight in compressed)
    return (
        f"auto: {count} of {len(compressed)} matrices fast, the others packed, which should leave {room}; one whose "
        f"weights would take {MAX_BITS_PER_WEIGHT} bits or more is packed too"
    )


def notes_on_shortage(ranks: list[Rank], settings: Settings, config: ModelConfig) -> list[str]:
    """Return a sentence if not even packed matrices leave room for the tokens that "auto" was to leave room for."""
    wanted = settings.kv_tokens
    if not wanted or settings.kv_cache_memory is not None:  # vLLM itself checks --max-model-len
        return []
    cache = kv_cache_of(config, settings)
    found = outcome(ranks, cache, settings, config.context, unproven).tokens
    if found >= wanted or any(rank.fast for rank in ranks):
        return []
    if not found:
        return [
            f"kv_tokens {wanted:,}: even with all matrices packed there is no room for KV cache. "
            "Use more or larger GPUs"
        ]
    return [
        f"kv_tokens {wanted:,}: even with all matrices packed there is room for about {found:,} tokens of KV cache. "
        "Lower kv_tokens, or use more or larger GPUs"
    ]


def notes_on_states(cache: KVCache) -> list[str]:
    """Return a remark on layers that keep a state per request, which tokens do not show."""
    states = [page for group in cache.groups for page in group.pages if page.states]
    if not states:
        return []
    held = states[0].states
    size = show_size(sum(page.page_bytes * held for page in states))
    note = f"layers with a state: {len(states)}; of these a request of any length holds {size} in the KV cache"
    if len(states) < sum(len(group.pages) for group in cache.groups):
        block = max(page.block_size for page in states)
        note += f", {held} per layer, in pages as large as those of {block:,} tokens"
    return [note]


def _kept(weights: list[Weight]) -> str:
    """Return in words what is not compressed, beside norms and biases."""
    kept = [weight for weight in weights if not weight.is_compressed]
    is_read = [weight.name.endswith("kv_b_proj") for weight in kept]  # by latent attention
    kinds = {
        "routers of experts": any(weight.name.endswith(_ROUTERS) for weight in kept),
        "convolutions and embeddings of positions": any(
            "patch" in weight.name or "pos" in weight.name or weight.name.endswith("wpe")
            for weight in kept
            if weight.is_of_tower or weight.cols > 1
        ),
        "the weights that latent attention reads (kv_b_proj)": any(is_read),
        "linear layers without a quantization method in vLLM": any(
            weight.split in ("rows", "cols") and weight.cols > 1 and not read
            for weight, read in zip(kept, is_read, strict=True)
        ),
    }  # fmt: skip
    return ", ".join(kind for kind, is_there in kinds.items() if is_there)


def _of_dtype(config: ModelConfig, files: Files | None) -> list[str]:
    """Return remarks on the dtype: which one is assumed, and what is converted."""
    found = files.dtypes if files else {}
    stored = {DTYPES[name]: count for name, count in found.items() if name in DTYPES}
    dtype = config.dtype or max(stored, key=lambda name: stored[name], default="")
    who = "config.json says" if config.dtype else "the files hold"
    if not dtype:
        return ["config.json names no dtype: bfloat16 is assumed"]
    if dtype == "float16":
        return [
            f"{who} float16: both columns are those of --dtype bfloat16, which DFloat11 needs and which rounds the "
            "weights; without it vLLM serves float16, in as many bytes as BF16"
        ]
    if dtype == "float32":
        return [
            f"{who} float32: both columns are those of bfloat16, to which vLLM rounds the weights by default; with "
            "--dtype float32 they would take twice the bytes of BF16, and DFloat11 would not work"
        ]
    others = {name: count for name, count in stored.items() if name != "bfloat16"}
    return [f"{count} tensors are stored in {name}; vLLM converts them" for name, count in others.items()]  # fmt: skip
