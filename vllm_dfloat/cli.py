"""The command line: vllm-dfloat compress | decompress | inspect | verify | plan.

Results go to stdout, progress and errors to stderr, an error as one line. Exit 0: fine; 1: different, or does not fit;
2: bad input or any other error; 130: interrupted; 141: nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_dfloat import __version__, cli_convert
from vllm_dfloat.cli_endings import is_unread, sentence, settle_stdout
from vllm_dfloat.errors import one_line
from vllm_dfloat.output import flush, say
from vllm_dfloat.plan.command import add_plan

if TYPE_CHECKING:
    from vllm_dfloat.checkpoint.compare import Comparison

EXIT_EQUAL, EXIT_DIFFERENT, EXIT_BAD_INPUT = 0, 1, 2
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141  # as shells say it: 128 and the signal
MAX_DIFFERENCES_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    args: argparse.Namespace | None = None
    try:
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        flush()  # here, where an error can still be told
        return status
    except (Exception, KeyboardInterrupt) as error:
        unread = isinstance(error, BrokenPipeError) and is_unread()
        settle_stdout()
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        if unread:
            return EXIT_UNREAD
        print(f"vllm-dfloat: {sentence(error, args)}", file=sys.stderr)
        return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_BAD_INPUT


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            EXIT_BAD_INPUT, one_line(f"{self.prog}: {message}. For help: {self.prog} -h") + "\n"
        )

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()
        super().exit(status, message)


@cache
def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="vllm-dfloat",
        description="Make, look at and check DFloat11 checkpoints.",
        epilog="example: vllm-dfloat compress ./Qwen3-8B ./Qwen3-8B-DF11. More: vllm-dfloat COMMAND -h",
    )
    parser.add_argument("--version", action="version", version=f"vllm-dfloat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli_convert.add_commands(commands)
    inspect = commands.add_parser(
        "inspect",
        help="show what is compressed, and how many bits each weight takes",
        epilog="example: vllm-dfloat inspect ./Qwen3-8B-DF11",
    )
    inspect.add_argument("path", type=Path, help="folder of a checkpoint, DFloat11 or plain")
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
    verify.add_argument("path", type=Path, help="folder of a checkpoint, DFloat11 or plain")
    verify.add_argument(
        "--against", type=Path, metavar="BF16_PATH", help="folder of the BF16 original"
    )
    verify.add_argument("--quiet", action="store_true", help="print differences and errors only")
    verify.set_defaults(run=_verify)
    for command in (inspect, verify, add_plan(commands)):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _inspect(args: argparse.Namespace) -> int:
    from vllm_dfloat.checkpoint.summary import summarize

    summary = summarize(args.path)
    if not args.quiet:
        say(json.dumps(summary.as_json(), indent=1) if args.json else summary.as_table())
    return EXIT_EQUAL


def _verify(args: argparse.Namespace) -> int:
    from vllm_dfloat.checkpoint.compare import check, compare

    def progress(name: str) -> None:
        if not args.quiet and sys.stderr.isatty():
            print(f"\r\x1b[K{one_line(name, 70)}", end="", file=sys.stderr, flush=True)

    try:
        against = args.against
        result = compare(args.path, against, progress) if against else check(args.path, progress)
    finally:
        progress("")  # an error has a line of its own
    for difference in result.differences[:MAX_DIFFERENCES_SHOWN]:
        say(difference)
    hidden = len(result.differences) - MAX_DIFFERENCES_SHOWN
    if hidden > 0:
        say(f"... and {hidden} more")
    if not args.quiet:
        say(_last_line(args, result))
    return EXIT_EQUAL if result.is_equal else EXIT_DIFFERENT


def _last_line(args: argparse.Namespace, result: Comparison) -> str:
    what = f"{result.tensors} tensors, {result.num_bytes:,} bytes"
    differences = len(result.differences)
    if args.against and result.is_equal:
        return f"{args.path}: equal to {args.against}, bit for bit ({what})"
    if args.against:
        return (
            f"{args.path}: DIFFERENT from {args.against} in {differences} tensors ({what} compared)"
        )
    if differences:
        return f"{args.path}: {what} decode, but {differences} files are not as the manifest says"
    if result.files is None:
        return (
            f"{args.path}: {what} decode without an error (no manifest; give --against to compare)"
        )
    return f"{args.path}: {what} decode without an error, and {result.files} files are as the manifest says"


if __name__ == "__main__":
    sys.exit(main())
