"""The command line: vllm-dfloat compress | decompress | inspect | verify | plan.

Results go to stdout, progress and errors to stderr, an error as one line. Exit 0: fine; 1: different, or does not fit;
2: bad input or any other error; 130: interrupted; 141: nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

from vllm_dfloat import __version__
from vllm_dfloat.commands import check, convert
from vllm_dfloat.commands.endings import is_unread, open_closed_streams, sentence, settle_stdout
from vllm_dfloat.commands.output import flush
from vllm_dfloat.commands.plan import add_plan
from vllm_dfloat.errors import one_line

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141  # as shells say it: 128 and the signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # paths may hold bytes that are not text
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
    """Prints an error in one line, as the commands do."""

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
    convert.add_commands(commands)
    check.add_commands(commands)
    add_plan(commands).add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
