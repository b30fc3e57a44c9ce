"""The commands that look at checkpoints: vllm-dfloat inspect | verify."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dfloat.commands.arguments import place
from vllm_dfloat.commands.output import counted, not_sought_clause, say, say_json
from vllm_dfloat.commands.progress import Bar

if TYPE_CHECKING:
    from vllm_dfloat.checkpoint.verify import Comparison

EXIT_EQUAL, EXIT_DIFFERENT = 0, 1
MAX_DIFFERENCES_SHOWN = 20


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `inspect` and `verify` to the parser."""
    inspect = commands.add_parser(
        "inspect",
        help="show what is compressed, and how many bits each weight takes",
        epilog="example: vllm-dfloat inspect ./Qwen3-8B-DF11",
    )
    inspect.add_argument(
        "path", type=place, help="folder of a checkpoint, DFloat11 or plain, or its hub id"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument("--quiet", action="store_true", help="print errors only")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify",
        help="decode everything, and compare it with the original or with its manifest",
        description="Decode everything. With --against, compare every tensor bit for bit with the original. "
        "Without it, compare size and SHA-256 of every file with dfloat11_manifest.json, if there is one.",
        epilog="example: vllm-dfloat verify ./Qwen3-8B-DF11 --against ./Qwen3-8B. "
        "Exit status: 0 equal, 1 different, 2 bad input.",
    )
    verify.add_argument(
        "path", type=place, help="folder of a checkpoint, DFloat11 or plain, or its hub id"
    )
    verify.add_argument(
        "--against",
        type=place,
        metavar="BF16_PATH",
        help="folder of the BF16 original, or its hub id",
    )
    verify.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    verify.add_argument(
        "--quiet", action="store_true", help="no progress; print differences and errors only"
    )
    verify.set_defaults(run=_verify)
    for command in (inspect, verify):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _inspect(args: argparse.Namespace) -> int:
    from vllm_dfloat.checkpoint.summary import summarize

    summary = summarize(_folder(args.path, args.quiet or args.json))
    if args.json:
        say_json(summary.as_json())
    elif not args.quiet:
        say(*summary.as_table())
    return EXIT_EQUAL


def _verify(args: argparse.Namespace) -> int:
    from vllm_dfloat.checkpoint.verify import check, compare

    folder = _folder(args.path, args.quiet)
    original = _folder(args.against, args.quiet) if args.against else None
    with Bar(args.quiet) as bar:
        if original:
            result = compare(folder, original, bar.start, bar.advance)
        else:
            result = check(folder, bar.start, bar.advance)
    if args.json:
        say_json(_as_json(args, result))
    else:
        _say_differences(result.differences)
        if not args.quiet:
            _say_differences(
                [f"{line}; it holds no weights, but vLLM reads it" for line in result.served]
            )
            say(_last_line(args, result))
    return EXIT_EQUAL if result.is_equal else EXIT_DIFFERENT


def _folder(given: str, quiet: bool) -> Path:
    """Return the folder of a checkpoint, which is fetched if its hub id was given."""
    from vllm_dfloat.checkpoint.hub import local_folder
    from vllm_dfloat.checkpoint.locate import check_checkpoint

    folder = local_folder(given, quiet)
    check_checkpoint(folder)
    return folder


def _as_json(args: argparse.Namespace, result: Comparison) -> dict[str, Any]:
    return {
        "path": args.path,
        "against": args.against,
        "equal": result.is_equal,
        "tensors": result.tensors,
        "num_bytes": result.num_bytes,
        "files": result.files,
        "not_sought": result.not_sought or None,
        "differences": result.differences,
        "other_files": result.served,
    }


def _say_differences(differences: list[str]) -> None:
    for difference in differences[:MAX_DIFFERENCES_SHOWN]:
        say(difference)
    hidden = len(differences) - MAX_DIFFERENCES_SHOWN
    if hidden > 0:
        say(f"... and {hidden} more")


def _last_line(args: argparse.Namespace, result: Comparison) -> str:
    what = f"{counted(result.tensors, 'tensor')}, {result.num_bytes:,} bytes"
    missing = not_sought_clause(result.not_sought)
    differences = len(result.differences)
    if args.against and result.files:
        what += f", {counted(result.files, 'file')} of weights beside them"
    places = counted(differences, "tensor or file" if result.files else "tensor")
    if args.against and result.is_equal:
        unlike = f"; other files that are not alike: {len(result.served)}" if result.served else ""
        return f"{args.path}: equal to {args.against}, bit for bit ({what}){unlike}"
    if args.against:
        return f"{args.path}: DIFFERENT from {args.against} in {places} ({what} compared)"
    if differences:
        return f"{args.path}: {what} decode, but not as the manifest says: {counted(differences, 'file')}"
    if not result.is_compressed:
        return f"{args.path}: {what}, none of them compressed (give --against to compare){missing}"
    if result.files is None:
        return f"{args.path}: {what} decode without an error (no manifest; give --against to compare){missing}"
    return f"{args.path}: {what} decode without an error; as the manifest says: {counted(result.files, 'file')}"
