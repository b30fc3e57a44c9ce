"""Decompression: interruptions, processes, memory. The tests of compression check its bits."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Checkpoint
from dfloat11_helpers import VECTORS
from interrupted import contents
from tiny_models import SHIPPED

from vllm_dfloat.checkpoint.verify import compare
from vllm_dfloat.cli import main
from vllm_dfloat.convert import decompress_file
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.resume import DECOMPRESSION
from vllm_dfloat.errors import FormatError

LLAMA = VECTORS / "llama-tiny-df11"


def test_rerun_after_a_kill_at_any_point_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "interrupted.py"
    command = [sys.executable, str(script), "decompress", str(LLAMA), str(tmp_path)]
    out = subprocess.run([*command, "2", "8", "4"], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    whole, *runs = map(json.loads, out.stdout.splitlines())
    assert sum(name.endswith(".safetensors") for name in whole["files"]) > 3
    assert len(runs) == 12
    for run in runs:
        expected = signal.SIGKILL if "event" in run["kill"] else signal.SIGXFSZ
        assert run["status"] & 0x7F == expected, run["kill"]
        assert run["again"] == 0
        assert run["files"] == whole["files"], run["kill"]
    # The kills were of every kind: files half written, some finished, the journal there or not yet.
    assert any(name.startswith(".tmp-") for run in runs for name in run["left"])
    assert len({tuple(run["left"]) for run in runs}) > 3


def test_finished_shards_are_kept_and_changed_ones_made_again(tmp_path: Path) -> None:
    decompress(LLAMA, tmp_path / "whole", shard_bytes=300_000)
    seen: list[int] = []

    def stop_after_three(count: int) -> None:
        seen.append(count)
        if len(list((tmp_path / "t").glob("model-*"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompress(LLAMA, tmp_path / "t", advance=stop_after_three, shard_bytes=300_000)
    first, second, third = sorted((tmp_path / "t").glob("model-*"))
    assert (tmp_path / "t" / DECOMPRESSION.journal).exists()
    assert not list((tmp_path / "t").glob(".tmp-*"))
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    before = {file: file.stat().st_ino for file in (first, second, third)}
    starts: list[tuple[int, int]] = []
    decompress(
        LLAMA,
        tmp_path / "t",
        start=lambda total, done: starts.append((total, done)),
        shard_bytes=300_000,
    )
    ((total, done),) = starts
    assert 0 < done < total
    assert [before[file] == file.stat().st_ino for file in before] == [True, False, True]
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_other_shards_or_another_checkpoint_do_not_go_on_with_what_was_begun(
    tmp_path: Path,
) -> None:
    (tmp_path / "t").mkdir()
    journal = tmp_path / "t" / DECOMPRESSION.journal
    journal.write_text(json.dumps({"version": 1, "source": "another"}) + "\n")
    with pytest.raises(FormatError, match="beginning of a decompression of other weights"):
        decompress(LLAMA, tmp_path / "t")
    decompress(LLAMA, tmp_path / "t", force=True)
    assert not journal.exists()


def test_processes_write_the_same_bytes_and_report_all_of_them(tmp_path: Path) -> None:
    seen: list[int] = []
    decompress(LLAMA, tmp_path / "one", advance=seen.append, shard_bytes=300_000)
    total = sum(seen)
    seen.clear()
    decompress(LLAMA, tmp_path / "two", workers=2, advance=seen.append, shard_bytes=300_000)
    assert sum(seen) == total
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert compare(LLAMA, tmp_path / "two").is_equal


@pytest.mark.parametrize("given", ["", "config.json", "model.safetensors.index.json"])
def test_shapes_that_the_config_does_not_give_come_from_the_original(
    given: str, bf16_checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Bug caught: advice to give the config of the original model, when no option took it.
    source, original = tmp_path / "df11", tmp_path / "original"
    shutil.copytree(LLAMA, source)
    shutil.copytree(bf16_checkpoint("llama-tiny"), original)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows-it"}))
    assert main(["decompress", str(source), str(tmp_path / "t")]) == 2
    line = capsys.readouterr().err
    assert "`nobody-knows-it`" in line
    assert "With --original FOLDER, the weight files of the BF16 model tell them." in line
    command = ["decompress", str(source), str(tmp_path / "t"), "--original", str(original / given)]
    if given == "model.safetensors.index.json":
        assert main(command) == 2
        assert str(original) in capsys.readouterr().err
        return
    if given:  # then there is nothing else to read
        (original / "model.safetensors").unlink()
    assert main(command) == 0
    assert compare(tmp_path / "t", bf16_checkpoint("llama-tiny")).is_equal


def test_an_original_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["decompress", str(LLAMA), str(tmp_path / "t"), "--original", str(SHIPPED)]
    assert main(command) == 2
    assert "belong to different models" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_an_interruption_ends_with_130_and_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decompress_file, "decode_range", interrupted)
    assert main(["decompress", str(LLAMA), str(tmp_path / "t")]) == 130
    assert capsys.readouterr().err == "vllm-dfloat: interrupted.\n"
    assert [path.name for path in (tmp_path / "t").iterdir()] == [DECOMPRESSION.journal]
