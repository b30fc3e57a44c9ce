"""Clock and power of the first GPU while something runs, read from nvidia-smi."""

import shutil
import statistics
import subprocess
from types import TracebackType

QUERY = [
    "nvidia-smi",
    "--id=0",
    "--query-gpu=clocks.sm,power.draw",
    "--format=csv,noheader,nounits",
    "-lms",
    "500",
]


class Watch:
    """A context manager; afterwards `summary()` says what was read meanwhile, nothing without nvidia-smi."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._text = ""

    def __enter__(self) -> "Watch":
        if shutil.which(QUERY[0]):
            self._process = subprocess.Popen(
                QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._text = self._process.communicate()[0]

    def summary(self) -> dict[str, float]:
        """Return mean clock `mhz` and power `watts`."""
        return summarize(self._text)


def summarize(text: str) -> dict[str, float]:
    """Return the means of lines "MHz, W"; lines without numbers do not count."""
    pairs = []
    for line in text.splitlines():
        try:
            mhz, watts = map(float, line.split(","))
        except ValueError:
            continue
        pairs.append((mhz, watts))
    if not pairs:
        return {}
    return {
        "mhz": round(statistics.mean(mhz for mhz, _ in pairs)),
        "watts": round(statistics.mean(watts for _, watts in pairs)),
    }
