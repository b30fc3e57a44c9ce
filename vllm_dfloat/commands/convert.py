"""The commands that make checkpoints: vllm-dfloat compress | decompress."""

from __future__ import annotations

import argparse
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dfloat.commands.arguments import path, place
from vllm_dfloat.commands.output import counted, not_sought_clause, say, say_json
from vllm_dfloat.commands.progress import Bar
from vllm_dfloat.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm_dfloat.convert.compress import Report
    from vllm_dfloat.convert.decompress import Restored
    from vllm_dfloat.dfloat11.coder import Coder

# Files made at the same time if a GPU encodes: it waits for hashing, which takes a core about 1.2 ns per weight.
_GPU_THREADS = 4
_WAS_FINISHED = "was finished before, and neither its files nor its source have changed since"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compress` and `decompress` to the parser."""
    for command in (_add_compress(commands), _add_decompress(commands)):
        command.add_argument(
            "--workers", type=_positive, help="processes (default: as cores and memory allow)"
        )
        command.add_argument(
            "--force", action="store_true", help="replace the checkpoint in an existing folder"
        )
        command.add_argument(
            "--json", action="store_true", help="print one JSON object instead of lines"
        )
        command.add_argument("--quiet", action="store_true", help="print errors only")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_compress(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    compress = commands.add_parser(
        "compress",
        help="write a BF16 model as a DFloat11 checkpoint; goes on where it was interrupted",
        epilog="example: vllm-dfloat compress ./Qwen3-8B ./Qwen3-8B-DF11",
    )
    compress.add_argument("source", type=place, help="folder of a BF16 model, or its hub id")
    compress.add_argument("target", type=path, help="folder to write; new, empty, or begun earlier")
    compress.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="auto|cpu|cuda[:N]",
        help="what encodes and compares (default: auto, a GPU where there is one)",
    )
    compress.set_defaults(run=_compress)
    return compress


def _add_decompress(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    decompress = commands.add_parser(
        "decompress",
        help="write a DFloat11 checkpoint back as BF16 safetensors, bit for bit; goes on where it was interrupted",
        epilog="example: vllm-dfloat decompress ./Qwen3-8B-DF11 ./Qwen3-8B-again",
    )
    decompress.add_argument(
        "path", type=place, help="folder of a DFloat11 checkpoint, or its hub id"
    )
    decompress.add_argument("out", type=path, help="folder to write; new, empty, or begun earlier")
    decompress.add_argument(
        "--original",
        type=path,
        metavar="PATH",
        help="folder or config.json of the BF16 model: the shapes of weights, where neither a manifest nor the "
        "checkpoint's own config gives them",
    )
    decompress.set_defaults(run=_decompress)
    return decompress


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text[:9]) > 0 and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text} is no number of processes; expected 1 or more")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not known; expected auto, cpu, cuda, or cuda:N, N being the number of a GPU"
        )
    return text


def _compress(args: argparse.Namespace) -> int:
    from vllm_dfloat.checkpoint.hub import local_folder
    from vllm_dfloat.checkpoint.locate import check_bf16
    from vllm_dfloat.convert.compress import compress
    from vllm_dfloat.convert.left import left_lines, left_out_lines
    from vllm_dfloat.convert.source import open_source

    coder = _coder(args.device, args.workers)
    folder = local_folder(args.source, args.quiet)
    check_bf16(folder)
    with Bar(args.quiet) as bar:
        source = open_source(folder)
        workers = _GPU_THREADS if coder else args.workers
        report = compress(source, args.target, args.force, workers, bar.start, bar.advance, coder)
    if args.json:
        say_json(_compressed_json(args, report))
    elif not args.quiet:
        for line in (*left_lines(report.left), *left_out_lines(report.left_out)):
            say(line)
        say(_compressed_line(args.target, report))
    return 0


def _coder(device: str, workers: int | None) -> Coder | None:
    """Return the coder for a GPU, None for the CPU; `workers` are processes on the CPU."""
    if device == "auto" and (workers or not _may_have_gpu()):
        return None
    if device == "cpu":
        return None
    if workers:
        raise UnsupportedError(
            f"--workers {workers} with --device {device}: one process feeds a GPU. Leave out one of the two."
        )
    try:
        from vllm_dfloat.device.unit_coder import coder_of
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"--device {device}: a GPU needs torch and Triton, and {error.name} is not installed. Install them: "
            "pip install torch triton; or take --device cpu."
        ) from error
    return coder_of(device)


def _may_have_gpu() -> bool:
    """Return whether a GPU is likely enough to import torch, which takes seconds."""
    drivers = ("/dev/nvidiactl", "/dev/dxg")
    packages = find_spec("torch") and find_spec("triton")
    return bool(packages) and any(Path(driver).exists() for driver in drivers)


def _compressed_json(args: argparse.Namespace, report: Report) -> dict[str, Any]:
    return {
        "source": args.source,
        "target": str(args.target),
        "units": report.units,
        "num_bytes": report.num_bytes,
        "bf16_bytes": report.bf16_bytes,
        "left": dict(report.left),
        "left_out": dict(report.left_out),
        "seconds": report.seconds,
        "was_finished": report.was_finished,
    }


def _compressed_line(target: Path, report: Report) -> str:
    ratio = 100 * report.num_bytes / report.bf16_bytes
    what = f"{ratio:.1f} % ({report.bf16_bytes:,} => {report.num_bytes:,} bytes), {counted(report.units, 'unit')}"
    if report.was_finished:
        return f"{target}: {_WAS_FINISHED}: {what}"
    return f"{target}: {what}, all decoded and compared, {report.seconds:.1f} s"


def _decompress(args: argparse.Namespace) -> int:
    from vllm_dfloat.checkpoint.hub import local_folder
    from vllm_dfloat.checkpoint.locate import check_dfloat11
    from vllm_dfloat.convert.decompress import decompress
    from vllm_dfloat.convert.left import left_out_lines
    from vllm_dfloat.convert.listed_files import others_line

    folder = local_folder(args.path, args.quiet)
    check_dfloat11(folder)
    began = time.monotonic()
    with Bar(args.quiet) as bar:
        restored = decompress(
            folder,
            args.out,
            args.force,
            args.workers,
            bar.start,
            bar.advance,
            original=args.original,
        )
    seconds = time.monotonic() - began
    if args.json:
        say_json(_restored_json(args, restored, seconds))
    elif not args.quiet:
        for line in left_out_lines(restored.left_out):
            say(line)
        if restored.not_as_listed:
            say(others_line(tuple(restored.not_as_listed)))
        say(_restored_line(args.out, restored, seconds))
    return 0


def _restored_json(args: argparse.Namespace, restored: Restored, seconds: float) -> dict[str, Any]:
    return {
        "path": args.path,
        "out": str(args.out),
        "tensors": restored.tensors,
        "num_bytes": restored.num_bytes,
        "left_out": dict(restored.left_out),
        "not_sought": restored.not_sought or None,
        "not_as_listed": list(restored.not_as_listed),
        "seconds": seconds,
        "was_finished": restored.was_finished,
    }


def _restored_line(out: Path, restored: Restored, seconds: float) -> str:
    what = f"{counted(restored.tensors, 'tensor')}, {restored.num_bytes:,} bytes"
    end = not_sought_clause(restored.not_sought)
    if restored.was_finished:
        return f"{out}: {_WAS_FINISHED}: {what}{end}"
    return f"{out}: {what}, {seconds:.1f} s{end}"
