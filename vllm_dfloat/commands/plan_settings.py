"""The settings that the arguments of `vllm-dfloat plan` ask for, and what is refused of them."""

import argparse

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.plan import layout_sizes
from vllm_dfloat.plan.byte_sizes import GIB, parse_size
from vllm_dfloat.plan.offload import Prefetch
from vllm_dfloat.plan.settings import MODES, Settings

MAX_OFFLOAD = 1 << 20  # GiB


def settings_of(args: argparse.Namespace) -> Settings:
    """Return how the model is to be served; of --layout all with the first layout.

    Raises:
        UnsupportedError: a value is out of range, or values contradict each other.
    """
    tp = _ranks(args)
    _check(args)
    gpu_memory = parse_size(args.gpu_memory, "--gpu-memory")
    if not gpu_memory:
        raise UnsupportedError(f"--gpu-memory {args.gpu_memory}: expected more than nothing.")
    settings = Settings(
        tp=tp,
        pp=args.pp,
        dp=args.dp,
        gpu_memory=gpu_memory,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len,
        kv_cache_dtype=args.kv_cache_dtype,
        mamba_ssm_cache_dtype=args.mamba_ssm_cache_dtype,
        prefix_caching=args.enable_prefix_caching,
        block_size=args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        overhead=parse_size(args.overhead, "--overhead") if args.overhead else None,
        kv_cache_memory=parse_size(args.kv_cache_memory, "--kv-cache-memory") if args.kv_cache_memory else None,
        cpu_offload=int(args.cpu_offload_gb * GIB),
        prefetch=_prefetch(args),
        expert_parallel=args.enable_expert_parallel,
        granularity=args.granularity,
        kv_tokens=args.kv_tokens,
        mode=args.mode,
        layout=layout_sizes.LAYOUTS[0] if args.layout == "all" else args.layout,
        slab=_slab(args.slab),
    )  # fmt: skip
    layout_sizes.check(args.layout, args.granularity)
    return settings


def _prefetch(args: argparse.Namespace) -> Prefetch:
    """Return vLLM's options of prefetching offload.

    Raises:
        UnsupportedError: vLLM refuses them, or they would change nothing.
    """
    if not args.offload_group_size:
        _refuse_without_groups(args)
    elif args.cpu_offload_gb:
        raise UnsupportedError(
            f"--cpu-offload-gb {args.cpu_offload_gb:g} with --offload-group-size {args.offload_group_size}: vLLM then "
            "leaves --cpu-offload-gb aside; expected one of them. Remove the other."
        )
    prefetch = Prefetch(
        args.offload_group_size,
        args.offload_num_in_group,
        args.offload_prefetch_step,
        frozenset(args.offload_params),
    )
    prefetch.check()
    return prefetch


def _refuse_without_groups(args: argparse.Namespace) -> None:
    given = {
        f"--offload-params {' '.join(args.offload_params)}": bool(args.offload_params),
        f"--offload-num-in-group {args.offload_num_in_group}": args.offload_num_in_group != 1,
        f"--offload-prefetch-step {args.offload_prefetch_step}": args.offload_prefetch_step != 1,
    }
    for option, is_given in given.items():
        if is_given:
            raise UnsupportedError(
                f"{option} without --offload-group-size: it needs groups. Give --offload-group-size, or leave "
                f"{option.partition(' ')[0]} out."
            )


def _slab(given: str | None) -> int | None:
    """Return the bytes of a slab, 0 for "off", None for "auto".

    Raises:
        UnsupportedError: anything else than these or a size, or one of no bytes, which the option refuses too.
    """
    if given is None or given == "auto":
        return None
    if given == "off":
        return 0
    size = int(given) if given.isdecimal() else parse_size(given, "--slab")
    if not size:
        raise UnsupportedError(
            f"--slab {given}: expected auto, off, a positive number of bytes, or as 64MiB."
        )
    return size


def _ranks(args: argparse.Namespace) -> int:
    """Return the ranks of tensor parallelism.

    Raises:
        UnsupportedError: --gpus, --tp, --pp and --dp contradict each other.
    """
    for name in ("gpus", "tp", "pp", "dp"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UnsupportedError(f"--{name} {value}: expected at least 1.")
    rest = args.pp * args.dp
    tp: int = args.tp or max(1, (args.gpus or 1) // rest)
    if args.gpus is not None and tp * rest != args.gpus:
        others = f" times --dp {args.dp}" if args.dp > 1 else ""
        raise UnsupportedError(
            f"--gpus {args.gpus}: --tp {tp} times --pp {args.pp}{others} is {tp * rest}; expected the same number."
        )
    return tp


def _check(args: argparse.Namespace) -> None:
    for name in (
        "max_model_len",
        "block_size",
        "max_num_batched_tokens",
        "max_num_seqs",
        "kv_tokens",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UnsupportedError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise UnsupportedError(
            f"--gpu-memory-utilization {args.gpu_memory_utilization:g}: expected a fraction over 0, at most 1."
        )
    if not 0 <= args.cpu_offload_gb < MAX_OFFLOAD:
        raise UnsupportedError(
            f"--cpu-offload-gb {args.cpu_offload_gb:g}: expected GiB per GPU, at least 0 and below {MAX_OFFLOAD:,}."
        )
    _check_of_auto(args)
    if args.kv_tokens and args.kv_cache_memory:
        raise UnsupportedError(
            f"--kv-tokens {args.kv_tokens} with --kv-cache-memory {args.kv_cache_memory}: each says how large the KV "
            "cache is; expected one of them. Remove the other."
        )
    if args.code_bits is not None and not 1 <= args.code_bits <= 8:
        raise UnsupportedError(f"--code-bits {args.code_bits:g}: expected 1 to 8.")


def _check_of_auto(args: argparse.Namespace) -> None:
    """Refuse what only layout auto goes by, with another layout."""
    given = {
        f"--kv-tokens {args.kv_tokens}": bool(args.kv_tokens),
        f"--mode {args.mode}": args.mode != MODES[0],
    }
    for option, is_given in given.items():
        if is_given and args.layout not in (layout_sizes.AUTO, "all"):
            raise UnsupportedError(
                f"{option} with --layout {args.layout}: it changes what layout auto chooses, and nothing else; "
                f"expected --layout auto or all. Give one of these, or leave {option.partition(' ')[0]} out."
            )
