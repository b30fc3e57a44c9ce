"""Output of the commands in addition to their lines for people: progress on a terminal, JSON for programs."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import termios
from pathlib import Path

import pytest
from cli_commands import COMMANDS, make_places, only_line
from tiny_models import SHIPPED

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE, read_manifest
from vllm_dfloat.checkpoint.verify import check, compare
from vllm_dfloat.cli import main


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with the shipped model, compressed."""
    target = tmp_path_factory.mktemp("output") / "tiny-df11"
    assert main(["compress", str(SHIPPED), str(target), "--quiet"]) == 0
    return target


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_places(tmp_path_factory.mktemp("places"))


def on_terminal(arguments: list[str]) -> str:
    """Run a command with a terminal of 120 columns as stderr; return what it shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    os.set_blocking(master, False)
    try:
        with os.fdopen(slave, "w") as stream, contextlib.redirect_stderr(stream):
            assert main(arguments) == 0
            stream.flush()
            return os.read(master, 1 << 16).decode()
    except BlockingIOError:
        return ""
    finally:
        os.close(master)


@pytest.mark.parametrize("option", [["--against", str(SHIPPED)], []])
def test_verify_shows_a_bar_with_bytes_rate_and_time_left(
    option: list[str], compressed: Path
) -> None:
    shown = on_terminal(["verify", str(compressed), *option])
    total = "6.57M" if option else r"11\.\dM"  # without --against every file is read too
    assert re.search(rf"\d+%\|.*\| .*/{total} \[\d\d:\d\d<.*B/s\]", shown), shown


def test_quiet_shows_no_bar(compressed: Path) -> None:
    assert on_terminal(["verify", str(compressed), "--quiet"]) == ""


def test_verify_reports_the_bytes_of_both_phases_one_by_one(compressed: Path) -> None:
    manifest = read_manifest(compressed)
    assert manifest is not None
    files = sum(entry["bytes"] for entry in manifest.files.values())
    decoded = sum(file.stat().st_size for file in SHIPPED.glob("*.safetensors"))
    for run, expected in (
        (lambda *report: compare(compressed, SHIPPED, *report), decoded),
        (lambda *report: check(compressed, *report), decoded + files),
    ):
        starts: list[tuple[int, int]] = []
        steps: list[int] = []
        assert run(lambda total, done, s=starts: s.append((total, done)), steps.append).is_equal
        ((total, done),) = starts
        assert done == 0
        assert sum(steps) == total
        assert expected - 8000 < total <= expected  # headers are not decoded
        assert max(steps) < total / 4


KEYS = {
    "compress": {
        "source", "target", "units", "num_bytes", "bf16_bytes", "left", "left_out", "seconds", "was_finished",
    },
    "decompress": {
        "path", "out", "tensors", "num_bytes", "left_out", "not_sought", "not_as_listed", "seconds", "was_finished",
    },
    "verify": {
        "path", "against", "equal", "tensors", "num_bytes", "files", "not_sought", "differences",
        "other_files",
    },
    "inspect": {"path", "modules", "totals"},
}  # fmt: skip


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("name", KEYS)
def test_json_is_one_object_with_the_same_keys_on_stdout_alone(
    name: str,
    quiet: list[str],
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {**places, "new": tmp_path / "new"}
    command = [argument.format(**names) for argument in COMMANDS[name]]
    assert main([*command, "--json", *quiet]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out).keys() == KEYS[name]


def test_json_says_what_the_lines_say(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> dict[str, object]:
        main([*map(str, arguments), "--json"])
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    target = tmp_path / "t"
    report = run("compress", SHIPPED, target)
    assert report["num_bytes"] == sum(f.stat().st_size for f in target.glob("*.safetensors"))
    assert (report["source"], report["target"]) == (str(SHIPPED), str(target))
    assert (report["units"], report["left"]) == (6, {})
    found = run("verify", target, "--against", SHIPPED)
    assert (found["equal"], found["differences"], found["files"]) == (True, [], None)
    assert (found["tensors"], found["num_bytes"]) == (39, 6574592)
    found = run("decompress", target, tmp_path / "out")
    assert (found["tensors"], found["num_bytes"]) == (39, 6574592)


def test_json_of_a_difference_has_all_of_them_and_exits_1(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in compressed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    for i in range(30):
        manifest["files"][f"missing-{i}.txt"] = {"bytes": 1, "sha256": "0" * 64}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert main(["verify", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert len(found["differences"]) == 30


@pytest.mark.parametrize("name", KEYS)
def test_an_error_with_json_is_one_line_on_stderr_and_nothing_on_stdout(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / place) for place in ("nowhere", "new")]
    assert main([name, *arguments[: 2 if "compress" in name else 1], "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert only_line(err).startswith("vllm-dfloat: ")


def test_a_device_that_is_not_known_is_refused_with_the_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for device in ("gpu", "cuda:", "cuda:x", "GPU0", ""):
        with pytest.raises(SystemExit) as end:
            main(["compress", "a", "b", f"--device={device}"])
        assert end.value.code == 2
        line = only_line(capsys.readouterr().err)
        assert (
            f"argument --device: {device!r} is not known; expected auto, cpu, cuda, or cuda:N"
            in line
        )
