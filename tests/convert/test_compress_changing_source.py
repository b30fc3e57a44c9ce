"""A source that changes while it is read: one sentence that names the file, and no wrong output counts as finished."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from cli_commands import only_line
from interrupted import contents
from safetensors.torch import load_file, save_file

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.cli import main
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.resume import COMPRESSION
from vllm_dfloat.convert.source import open_source
from vllm_dfloat.dfloat11.encode import count_weights, measure_unit
from vllm_dfloat.errors import ChangedError, DFloatError, FormatError
from vllm_dfloat.storage.file_identity import FileIdentity
from vllm_dfloat.storage.safetensors_read import read_header

WEIGHTS = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LAYERS = 3


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i}.mlp.{n}.weight" for i in range(LAYERS) for n in ("up", "down")]
    return {n: (torch.randn(96, 64, generator=generator) * 0.02).bfloat16() for n in names}


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write a model of two shards with an index, a config and a tokenizer."""
    folder.mkdir()
    tensors = weights(seed)
    weight_map = {}
    for number, layers in ((1, (0,)), (2, (1, 2))):
        part = {n: t for n, t in tensors.items() if int(n.split(".")[2]) in layers}
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "seed": seed}))
    (folder / "tokenizer.json").write_text(f"tokenizer {seed}")
    return folder


def replace(file: Path, other: Path) -> None:
    shutil.copy(other, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def rewrite_and_hide(file: Path, other: Path) -> None:
    """Overwrite a file in place with the same size, and restore its modification time."""
    status = file.stat()
    with file.open("rb+") as stream:
        stream.write(other.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def link_elsewhere(file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(other)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "replaced": replace,
    "rewritten": rewrite_and_hide,
    "truncated": lambda file, other: os.truncate(file, file.stat().st_size // 2),
    "extended": lambda file, other: os.truncate(file, file.stat().st_size + 8),
    "touched": lambda file, other: file.touch(),
    "removed": lambda file, other: file.unlink(),
    "linked": link_elsewhere,
}


def once(change: Callable[[], object], at: int) -> Callable[[int], None]:
    """Return a progress callback that calls `change` in its own `at`-th call."""
    calls = 0

    def advance(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            change()

    return advance


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of two models, and of both compressed: one, two, one-df11, two-df11."""
    root = tmp_path_factory.mktemp("pristine")
    found = {name: make_model(root / name, seed) for seed, name in enumerate(("one", "two"))}
    for name, model in list(found.items()):
        found[f"{name}-df11"] = root / f"{name}-df11"
        compress(open_source(model), found[f"{name}-df11"])
    return found


def put_right(path: Path, name: str, other: Path, told: str) -> None:
    """Follow the advice for running the command again: let the writer finish, here with another model."""
    if "--force" in told:
        shutil.rmtree(path)
        shutil.copytree(other, path)
    else:
        (path / name).unlink(missing_ok=True)
        shutil.copy(other / name, path / name)


def num_calls(work: Callable[[Callable[[int], None]], object]) -> int:
    calls: list[int] = []
    work(calls.append)
    return len(calls)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", INDEX, "tokenizer.json"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_changed_at_any_point_of_compress_is_named_and_the_advice_works(
    kind: str, name: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    # Bug caught: exit 0 with a mixed model, "all decoded and compared".
    ends = num_calls(
        lambda advance: compress(open_source(pristine["one"]), tmp_path / "c", advance=advance)
    )
    for at in (1, ends // 2, ends):
        model, target = tmp_path / f"m{at}", tmp_path / f"t{at}"
        shutil.copytree(pristine["one"], model)
        change = lambda: CHANGES[kind](model / name, pristine["two"] / name)  # noqa: B023, E731
        with pytest.raises(ChangedError) as error:
            compress(open_source(model), target, advance=once(change, at))
        told = str(error.value)
        assert told.startswith(f"{model / name}: was changed after it was opened: it "), told
        assert (target / COMPRESSION.journal).exists()
        assert not (target / MANIFEST_FILE).exists()
        put_right(model, name, pristine["two"], told)
        compress(open_source(model), target, force="--force" in told)
        shutil.rmtree(tmp_path / "c")
        compress(open_source(model), tmp_path / "c")
        assert contents(target) == contents(tmp_path / "c")


def test_a_changed_side_file_costs_no_finished_weights(
    pristine: dict[str, Path], tmp_path: Path
) -> None:
    model, target = Path(shutil.copytree(pristine["one"], tmp_path / "m")), tmp_path / "t"
    change = lambda: (model / "tokenizer.json").write_text("another")  # noqa: E731
    with pytest.raises(ChangedError, match=r"tokenizer.json: .* what is finished stays"):
        compress(open_source(model), target, advance=once(change, 3))
    before = {file: file.stat().st_ino for file in target.glob("*.safetensors")}
    assert len(before) == LAYERS
    compress(open_source(model), target)
    assert {file: file.stat().st_ino for file in target.glob("*.safetensors")} == before
    assert (target / "tokenizer.json").read_text() == "another"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("added.txt", "what is finished stays"),
        ("model-00003.safetensors.index.json", "with --force"),
        ("model.safetensors", ""),
    ],
)
def test_a_file_that_appears_is_named_if_it_belongs_to_the_model(
    name: str, advice: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(pristine["one"], tmp_path / "m"))
    change = lambda: (model / name).write_text("{}")  # noqa: E731
    if not advice:  # with an index, a weight file that it does not name is never read
        compress(open_source(model), tmp_path / "t", advance=once(change, 2))
        return
    with pytest.raises(ChangedError, match=f"{name}: .*it was not there before.* {advice}"):
        compress(open_source(model), tmp_path / "t", advance=once(change, 2))


def test_a_shard_that_appears_without_an_index_is_named(
    pristine: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(pristine["one"], tmp_path / "m"))
    (model / INDEX).unlink()
    change = lambda: shutil.copy(pristine["two"] / WEIGHTS, model / "more.safetensors")  # noqa: E731
    with pytest.raises(ChangedError, match=r"more.safetensors: .*it was not there before"):
        compress(open_source(model), tmp_path / "t", advance=once(change, 2))


def test_a_worker_sees_that_its_file_is_not_the_one_that_was_opened(
    pristine: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: a worker opens the path again, and encodes the file that is there by then.
    model = Path(shutil.copytree(pristine["one"], tmp_path / "m"))
    swap = lambda *_: replace(model / WEIGHTS, pristine["two"] / WEIGHTS)  # noqa: E731
    with pytest.raises(ChangedError, match=f"{WEIGHTS}: .*it is another file now"):
        compress(open_source(model), tmp_path / "t", workers=2, start=swap)
    assert not list((tmp_path / "t").glob("model_layers_[12].safetensors"))


def test_the_command_ends_with_one_line_and_2(
    pristine: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Path(shutil.copytree(pristine["one"], tmp_path / "m"))
    opened = open_source

    def open_and_change(path: Path) -> object:
        source = opened(path)
        (model / WEIGHTS).touch()
        return source

    monkeypatch.setattr("vllm_dfloat.convert.source.open_source", open_and_change)
    assert main(["compress", str(model), str(tmp_path / "t")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert only_line(err) == (
        f"vllm-dfloat: {model / WEIGHTS}: was changed after it was opened: it was written to, or touched; expected the "
        "same until the end. When nothing writes there any more, run the same command again with --force: nothing made "
        "from it is used."
    )


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_changed_at_any_point_of_decompress_is_named_and_the_advice_works(
    kind: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    # Bug caught: a memory-mapped file that was truncated ended the process with SIGBUS.
    work = lambda path, out, advance=lambda _: None, force=False: decompress(  # noqa: E731
        path, out, force, advance=advance, shard_bytes=30_000
    )
    ends = num_calls(lambda advance: work(pristine["one-df11"], tmp_path / "c", advance))
    for name in ("model_layers_1.safetensors", "config.json", MANIFEST_FILE, "tokenizer.json"):
        for at in (1, ends // 2, ends):
            path, out = tmp_path / f"{name}{at}", tmp_path / f"{name}{at}-bf16"
            shutil.copytree(pristine["one-df11"], path)
            change = lambda: CHANGES[kind](path / name, pristine["two-df11"] / name)  # noqa: B023, E731
            with pytest.raises(ChangedError) as error:
                work(path, out, once(change, at))
            told = str(error.value)
            assert told.startswith(f"{path / name}: was changed after it was opened: it "), told
            put_right(path, name, pristine["two-df11"], told)
            work(path, out, force="--force" in told)
            shutil.rmtree(tmp_path / "c")
            work(path, tmp_path / "c")
            assert contents(out) == contents(tmp_path / "c")


def test_writes_that_no_time_tells_of_never_end_in_a_crash_or_an_internal_error(
    pristine: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Bug caught: "internal error, ValueError", and gaps written beyond their array.
    monkeypatch.setattr(FileIdentity, "difference", lambda self, now: "")
    flat, rich = tmp_path / "flat", tmp_path / "rich"
    for folder, scale in ((flat, 0.0), (rich, 1.0)):
        shutil.copytree(pristine["one"], folder)
        for file in folder.glob("*.safetensors"):
            tensors = {}
            for name in load_file(file):
                exponents = torch.randint(-100, 100, (96, 64), dtype=torch.float32) * scale
                tensors[name] = torch.pow(2.0, exponents).bfloat16()
            save_file(tensors, file, {"format": "pt"})
    ends = num_calls(lambda advance: compress(open_source(flat), tmp_path / "c", advance=advance))
    told = set()
    for at in range(1, ends + 1):
        model = Path(shutil.copytree(flat, tmp_path / f"m{at}"))
        change = lambda: rewrite_and_hide(model / WEIGHTS, rich / WEIGHTS)  # noqa: B023, E731
        try:
            compress(open_source(model), tmp_path / f"t{at}", advance=once(change, at))
        except DFloatError as error:
            told.add(str(error).partition(": ")[2])
    assert any("do not decode to the original bits" in text for text in told)
    assert any("changed meanwhile" in text for text in told)


def test_codes_that_outgrow_what_was_measured_are_refused() -> None:
    class Growing:
        """Weights of one exponent when they are first read, and of a rarer one afterwards."""

        size = 200_000

        def __init__(self) -> None:
            self.reads = 0

        def pieces(self) -> Iterator[np.ndarray]:
            self.reads += 1
            piece = np.full(self.size, 100 << 7, np.uint16)
            piece[:7] = np.arange(101, 108) << 7
            if self.reads > 1:
                piece[:] = 107 << 7
            yield piece

    unit = measure_unit([count_weights(Growing())], "grown")
    with pytest.raises(FormatError, match=r"more than the \d+ bits"):
        list(unit.tensors()["encoded_exponent"]())


def test_a_worker_that_is_killed_is_a_sentence_and_the_rerun_goes_on(tmp_path: Path) -> None:
    # Bug caught: "internal error, BrokenProcessPool".
    model, target = make_model(tmp_path / "m"), tmp_path / "t"

    def kill(_: int) -> None:
        for process in multiprocessing.active_children()[:1]:
            process.kill()

    with pytest.raises(DFloatError, match="a worker process was ended by SIGKILL, as the system"):
        compress(open_source(model), target, workers=2, advance=kill)
    compress(open_source(model), target)
    assert compare(target, model).is_equal


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *((name, MANIFEST_FILE) for name in ("model_layers_1.safetensors", "tokenizer.json", "config.json")),
        ("model_layers_1.safetensors", "config.json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["rewritten", "removed", "truncated"])
def test_a_finished_file_that_another_program_changes_is_named_and_made_again(
    kind: str,
    name: str,
    after: str,
    pristine: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: exit 0 with a manifest that lists missing files.
    source, target = open_source(pristine["one"]), tmp_path / "t"
    with monkeypatch.context() as patch:
        from vllm_dfloat.convert.work import Work

        write = Work.write_text

        def write_and_change(self: Work, file: str, text: str) -> None:
            write(self, file, text)
            if file == after:
                CHANGES[kind](target / name, pristine["two-df11"] / name)

        patch.setattr(Work, "write_text", write_and_change)
        with pytest.raises(FormatError, match=f"{name}: was changed by another program"):
            compress(source, target)
    compress(source, target)
    assert contents(target) == contents(pristine["one-df11"])


def test_identity_sees_every_kind_of_change_and_no_other(tmp_path: Path) -> None:
    before = FileIdentity(1, 2, 3, 4, 5)
    assert before.difference(before) == ""
    assert "3 before" in before.difference(FileIdentity(1, 2, 9, 4, 5))
    assert "touched" in before.difference(FileIdentity(1, 2, 3, 9, 9))
    assert "attributes" in before.difference(FileIdentity(1, 2, 3, 4, 9))
    assert "another file" in before.difference(FileIdentity(1, 9, 3, 4, 9))
    # A file system that renumbers its inodes, and one that has times in whole seconds only.
    assert before.difference(FileIdentity(1, 9, 3, 4, 5)) == ""
    coarse = FileIdentity(1, 2, 3, 4 * 10**9, 5 * 10**9)
    assert "another file" in coarse.difference(FileIdentity(1, 9, 3, 4 * 10**9, 5 * 10**9))


def test_a_mapped_tensor_of_a_replaced_file_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    tensor = next(iter(read_header(model / WEIGHTS).values()))
    tensor.bits()
    (model / WEIGHTS).touch()
    for read in (tensor.bits, tensor.read):
        with pytest.raises(ChangedError, match="touched"):
            read()


def test_official_checkpoints_are_watched_while_they_are_decompressed(tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_models.official("llama-tiny"), tmp_path / "df11"))
    file = path / "model_layers_1.safetensors"
    with pytest.raises(ChangedError, match=r"model_layers_1.safetensors: .*touched"):
        decompress(path, tmp_path / "t", advance=once(file.touch, 2))


@pytest.mark.parametrize("kind", ["replaced", "rewritten", "truncated"])
@pytest.mark.parametrize("changed", ["df11", "bf16", "plain"])
def test_a_file_changed_while_verify_reads_it_is_named(
    changed: str, kind: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    # Bug caught: SIGBUS after a memory-mapped file was truncated.
    folders = {"df11": "one-df11", "bf16": "one", "plain": "one"}
    for name, origin in folders.items():
        shutil.copytree(pristine[origin], tmp_path / name)
    file = "model_layers_2.safetensors" if changed == "df11" else WEIGHTS
    other = pristine["two-df11" if changed == "df11" else "two"] / file
    change = lambda: CHANGES[kind](tmp_path / changed / file, other)  # noqa: E731
    path = tmp_path / ("plain" if changed == "plain" else "df11")
    with pytest.raises(ChangedError, match=f"{changed}/{file}: was changed after it was opened"):
        compare(path, tmp_path / "bf16", advance=once(change, 2))
