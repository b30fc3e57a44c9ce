"""Settings that must be made before vLLM or Triton is imported, and checkpoints that several tests share."""

import logging
import os
import signal

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # ignored in the background of a shell; commands inherit this
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TRITON_INTERPRET", "1")  # no GPU needed; read when triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines run in this process: 1 s each, not 40
# Threads that spin while they wait would slow down the tests of other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import quick_interpreter

from vllm_dfloat.commands import progress

progress.tells_compiling = False  # stderr must not depend on numba's cache
quick_interpreter.install()

Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def bf16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a function: the name of an architecture or of a vector -> a folder with its BF16 checkpoint."""
    import tiny_models

    root = tmp_path_factory.mktemp("bf16")

    def make(name: str) -> Path:
        path = root / name
        if not path.exists():
            if name in tiny_models.ARCHITECTURES:
                tiny_models.save(name, path)
            else:
                tiny_models.save_decoded(name, path)
        return path

    return make


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Yield the list of lines that the plugin logs from now on."""
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return True

    # A filter, because vLLM replaces all handlers when its first engine starts.
    logger = logging.getLogger("vllm.dfloat11")
    logger.addFilter(collect)
    yield lines
    logger.removeFilter(collect)


@pytest.fixture
def followed_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make seals valid at any address of a descriptor or a table: opcheck gives an op copies of all tensors."""
    from vllm_dfloat.codec import descriptor

    salt = descriptor.salt
    monkeypatch.setattr(descriptor, "salt", lambda place, size: salt(0, size))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole matrix of engines too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("on_demand"):
                item.add_marker(pytest.mark.skip(reason="runs with --full, to save time"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """List the tests that run only with --full, with their outcomes."""
    if not config.getoption("--full"):
        return
    terminalreporter.section("on demand")
    for outcome in ("passed", "skipped", "failed", "error"):
        reports = terminalreporter.stats.get(outcome, [])
        names = [report.nodeid for report in reports if "on_demand" in report.keywords]
        terminalreporter.write_line(f"{len(names)} tests that run with --full only: {outcome}")
        for name in sorted(names):
            terminalreporter.write_line(f"  {name}")


_gpu_tests_run = 0


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _gpu_tests_run
    if report.when == "call" and "gpu" in report.keywords and not report.skipped:
        _gpu_tests_run += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that selected GPU tests but ran none on a GPU: skipped tests look like success."""
    if os.environ.get("VLLM_DFLOAT_REQUIRE_GPU") == "1" and not _gpu_tests_run:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(
            "\nVLLM_DFLOAT_REQUIRE_GPU=1, but no test marked `gpu` was run; a GPU run proves nothing so."
        )
