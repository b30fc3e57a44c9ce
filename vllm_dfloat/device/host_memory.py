"""The host memory that a process can still have: what the system says, and the limit of its container."""

from pathlib import Path

_UNLIMITED = 1 << 62  # cgroup v1 says so with a number near 2**63
# limit, usage, statistics, and the name there of pages of files that the kernel would give up
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that can be allocated without swapping; 2**62 if the system does not say."""
    system = _named(proc / "meminfo", "MemAvailable:")
    found = [_UNLIMITED if system is None else 1024 * system]
    for limit_file, usage_file, stat_file, reclaimable in _CGROUPS:
        limit, usage = _number(cgroup / limit_file), _number(cgroup / usage_file)
        if limit is not None and usage is not None and limit < _UNLIMITED:
            found.append(limit - usage + (_named(cgroup / stat_file, reclaimable) or 0))
    return max(0, min(found))


def _number(file: Path) -> int | None:
    """Return the number that a file holds; None without the file, or if it holds "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _named(file: Path, name: str) -> int | None:
    """Return the number that follows a name at the start of a line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None
