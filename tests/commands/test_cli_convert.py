"""`vllm-dfloat compress` and `decompress` as a user types them, and the result served by a real vLLM."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import Checkpoint
from engines import answers, bf16_answers
from interrupted import contents
from tiny_models import SHIPPED

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.cli import main


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the shipped model, compressed."""
    target = tmp_path_factory.mktemp("cli") / "tiny-df11"
    assert main(["compress", str(SHIPPED), str(target), "--quiet"]) == 0
    return target


def test_compress_ends_with_name_ratio_bytes_and_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "tiny-df11"
    assert main(["compress", str(SHIPPED), str(target)]) == 0
    out, err = capsys.readouterr()
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    found = re.fullmatch(
        r"(.*): (\d\d\.\d) % \((.*) => (.*) bytes\), 6 units, all decoded and compared, .* s",
        out.strip(),
    )
    assert found, out
    assert found.group(1) == str(target)
    assert int(found.group(4).replace(",", "")) == size
    assert err == ""


def test_quiet_prints_nothing(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(SHIPPED), str(tmp_path / "a"), "--quiet"]) == 0
    assert main(["decompress", str(compressed), str(tmp_path / "b"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_decompress_says_what_it_wrote_and_gives_the_model_back(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(compressed), "--against", str(SHIPPED)]) == 0
    assert main(["decompress", str(compressed), str(tmp_path / "out")]) == 0
    assert "39 tensors, 6,574,592 bytes" in capsys.readouterr().out
    for file in SHIPPED.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{nowhere}", "{out}"], "nowhere: no such folder"),
        (["compress", "{df11}", "{out}"], "is a DFloat11 checkpoint already"),
        (["compress", str(SHIPPED), "{full}"], "not the beginning of a compression; give --force"),
        (["compress", str(SHIPPED), "{out}", "--device", "cuda:9"], "cuda:9: torch "),
        (
            ["compress", str(SHIPPED), "{out}", "--device", "cuda", "--workers", "2"],
            "one process feeds a GPU",
        ),
        (["compress", "some-org/no-such-model", "{out}"], "cannot be fetched"),
        (["decompress", str(SHIPPED), "{out}"], "without dfloat11_config"),
        (["decompress", "{df11}", "{df11}"], "the source is never touched"),
        (["decompress", "{df11}", "{full}"], "not the beginning of a decompression; give --force"),
    ],
)
def test_refusals_are_one_sentence_and_exit_2(
    arguments: list[str],
    message: str,
    compressed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    names = {"nowhere": tmp_path / "nowhere", "out": tmp_path / "out", "full": tmp_path / "full"}
    before = {path: path.read_bytes() for path in compressed.iterdir()}
    assert main([a.format(**names, df11=compressed) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("vllm-dfloat: ")
    assert len(err.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in compressed.iterdir()} == before
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert main([*(a.format(**names, df11=compressed) for a in arguments), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "-h"])
    assert end.value.code == 0
    assert f"example: vllm-dfloat {command} " in capsys.readouterr().out


def test_a_terminal_shows_a_bar_with_rate_and_time_left(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    command = [
        sys.executable,
        "-m",
        "vllm_dfloat.cli",
        "compress",
        str(SHIPPED),
        str(tmp_path / "t"),
    ]
    environment = {**os.environ, "VLLM_DFLOAT_THREADS": "1"}
    subprocess.run(command, stderr=slave, stdout=subprocess.DEVNULL, env=environment, check=True)
    os.set_blocking(master, False)
    shown = os.read(master, 1 << 16).decode()  # read before the other end closes: that may drop it
    os.close(slave)
    os.close(master)
    assert re.search(r"\d+%\|.*\| .*/6\.57M \[\d\d:\d\d<.*B/s\]", shown), shown


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_one_sentence_and_the_rerun_ends_with_the_same_bytes(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    try:
        command = ["compress", str(SHIPPED), str(disk / "t")]
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "No space left on device" in err
        assert "free some space and run the same command again" in err
        first = {path.name: path.stat().st_ino for path in (disk / "t").glob("model_*")}
        assert first
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        assert main(command) == 0
        inodes = {path.name: path.stat().st_ino for path in (disk / "t").iterdir()}
        assert first.items() <= inodes.items()  # finished files were kept
        assert contents(disk / "t") == contents(compressed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.engine
def test_experts_are_served_from_their_units(bf16_checkpoint: Checkpoint, tmp_path: Path) -> None:
    # Bug caught: shapes taken from a model class that has all experts in one tensor, unlike the files.
    model = bf16_checkpoint("qwen3_moe")
    assert main(["compress", str(model), str(tmp_path / "df11"), "--quiet"]) == 0
    units = open_checkpoint(tmp_path / "df11").units
    assert "model.layers.1.mlp.experts.3" in units
    assert answers(tmp_path / "df11") == bf16_answers(model)
