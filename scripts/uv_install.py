"""Install packages into the environment of this Python with uv, which takes a fifth of pip's time.

python uv_install.py ARGUMENT...: the arguments of `pip install`. uv does not read pip's settings, so it gets those for
the sources of packages and their download. If pip has other settings, or uv cannot be installed, nothing is installed
and the exit status is not 0: the caller then uses pip.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

# pip's setting: uv's variable, and the separator of several values in it
GIVEN_ON = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}
OF_NO_MATTER = {
    *("cache-dir", "no-cache-dir", "disable-pip-version-check", "no-input", "require-virtualenv", "root-user-action"),
    *("quiet", "verbose", "no-color", "progress-bar", "no-warn-script-location", "retries", "log"),
}  # fmt: skip
SECTIONS = ("global", "install", ":env:")  # later ones go before earlier ones, as in pip
AS_PIP = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # the best version that any index has


def environment_of_uv(listed: str) -> dict[str, str] | None:
    """Return the variables that make uv look where pip looks, or None if there are none that do.

    Args:
        listed: what `pip config list` prints, lines like `global.index-url='https://...'`.
    """
    settings = [line.partition("=")[::2] for line in listed.splitlines()]
    found: dict[str, str] = {}
    for section in SECTIONS:
        for name in [name for name, _ in settings if name.startswith(f"{section}.")]:
            key, value = name.removeprefix(f"{section}."), dict(settings)[name]
            if key in GIVEN_ON:
                variable, between = GIVEN_ON[key]
                found[variable] = between.join(ast.literal_eval(value).split())
            elif key not in OF_NO_MATTER:
                return None
    return found


def main(arguments: list[str]) -> int:
    pip = [sys.executable, "-m", "pip"]
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True)
    settings = environment_of_uv(listed.stdout)
    if settings is None:
        return 3
    if subprocess.run([*pip, "install", "-qq", "--no-compile", "uv"]).returncode:
        return 3
    # Beside the packages, so that they can be linked and not copied; kept, it would hold them a second time.
    cache = Path(sys.prefix) / ".uv-cache"
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet"]
    command += ["--python", sys.executable, "--cache-dir", str(cache), *arguments]
    try:
        return subprocess.run(command, env={**os.environ, **AS_PIP, **settings}).returncode
    finally:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
