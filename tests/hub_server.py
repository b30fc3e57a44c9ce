"""A server that imitates the Hugging Face hub: models from folders, one that needs permission, one without files."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves `models`, org/gated, which needs permission, and org/empty, which has no files."""

    models: dict[str, Path]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_body: bool) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        is_api = path.startswith("/api/models/")
        org, name, *rest = path.removeprefix("/api/models" if is_api else "").strip("/").split("/")
        model = f"{org}/{name}"
        if is_api and (model in self.models or model == "org/gated"):
            return self._send(json.dumps(self._listing(model, rest)).encode(), with_body)
        file = self.models[model].joinpath(*rest[2:]) if model in self.models else Path("none")
        if model in self.models and rest[:1] == ["resolve"] and file.is_file():
            return self._send(file.read_bytes(), with_body)
        known = model in self.models or model == "org/empty"
        code = "GatedRepo" if model == "org/gated" else "EntryNotFound" if known else "RepoNotFound"
        self.send_response(403 if model == "org/gated" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _listing(self, model: str, rest: list[str]) -> object:
        """Return what the hub says of a model, or, of `rest` that begins with "tree", of its files."""
        if rest[:1] != ["tree"]:
            return {"id": model, "sha": COMMIT}
        if model == "org/gated":  # anybody may see what it holds
            return [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
        return [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)}
            for file in sorted(self.models[model].iterdir())
        ]

    def _send(self, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_server(models: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a hub with these models, folders by id, and the list of paths requested from it."""
    asked: list[str] = []
    handler = type("OneHub", (_Hub,), {"models": models, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
