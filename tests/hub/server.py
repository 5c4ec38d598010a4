"""A stand-in for the hub on loopback: repositories are folders ``models/USER/NAME`` and ``datasets/USER/NAME``.

It answers what huggingface_hub and datasets ask for to read a repository, and takes one commit of small files.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

_COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        resolve = re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path)
        if resolve:
            return self._file(self.root / (resolve[1] or "models") / resolve[2], resolve[3])
        api = re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        if path == "/api/whoami-v2":
            return self._json({"name": "ada", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if api is None:
            return self._missing("EntryNotFound")
        place = self.root / api[1] / api[2]
        if not place.is_dir():
            return self._missing("RepoNotFound")
        files = [file for file in sorted(place.rglob("*")) if file.is_file()]
        if api[3] == "tree":
            inside = place / (api[5] or "")
            if not inside.is_dir():
                return self._missing("EntryNotFound")
            below = inside.rglob("*") if "recursive=True" in self.path or "recursive=true" in self.path else inside.glob("*")
            return self._json([self._entry(place, one) for one in sorted(below)])
        names = [{"rfilename": file.relative_to(place).as_posix()} for file in files]
        self._json({"id": api[2], "sha": _COMMIT, "private": False, "tags": [], "siblings": names, "gated": False})

    def do_POST(self) -> None:  # noqa: N802
        path, body = unquote(urlparse(self.path).path), self._body()
        self.asked.append(f"POST {path}")
        if not self.headers.get("Authorization") and "paths-info" not in path:
            return self._send(401, b"{}")
        if path == "/api/validate-yaml":  # the head of a card
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization') or 'ada'}/{told['name']}"
            (self.root / "models" / name).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
        api = re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/(preupload|commit|paths-info)/.+", path)
        if api is None:
            return self._missing("EntryNotFound")
        place = self.root / api[1] / api[2]
        if api[3] == "paths-info":
            asked = json.loads(body)["paths"]
            return self._json([self._entry(place, place / one) for one in asked if (place / one).exists()])
        if api[3] == "preupload":
            files = json.loads(body)["files"]
            return self._json({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]})
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                file = place / told["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(told["value"]["content"]))
        url = f"http://{self.headers['Host']}/{api[2]}/commit/{_COMMIT}"
        self._json({"commitUrl": url, "commitOid": _COMMIT, "hookOutput": ""})

    def _entry(self, place: Path, file: Path) -> dict[str, object]:
        kind = "directory" if file.is_dir() else "file"
        size = 0 if file.is_dir() else file.stat().st_size
        return {"type": kind, "path": file.relative_to(place).as_posix(), "size": size, "oid": _COMMIT}

    def _file(self, place: Path, name: str) -> None:
        if not place.is_dir():
            return self._missing("RepoNotFound")
        file = place / name
        if not file.is_file():
            return self._missing("EntryNotFound")
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": _COMMIT,
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        self._send(200, content, headers)


@contextmanager
def serving(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub whose repositories lie in a folder, and what was asked of it."""
    handler = type("Handler", (_Handler,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
