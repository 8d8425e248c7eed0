"""A stand-in for the Hugging Face hub: repositories in memory, served over HTTP on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Repositories = dict[str, dict[str, bytes]]


@contextmanager
def hub() -> Iterator[tuple[str, Repositories]]:
    """Serve repositories; yield the address and the files of each repository."""
    repositories: Repositories = {}

    class Handler(_Handler):
        files = repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", repositories
    finally:
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    files: Repositories
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.files.setdefault(name, {})
            return self._json({"url": f"{address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            kinds = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self._json({"files": kinds})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[match[1]][value["path"]] = base64.b64decode(value["content"])
            done = {"commitUrl": f"{address}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            return self._json(done)
        return self._json({"error": f"no such address: {self.path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path):
            if match[1] not in self.files:
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in self.files[match[1]]]
            return self._json({"id": match[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+.*", path):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files[match[1]].items()
            ]
            return self._json(entries)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            content = self.files.get(match[1], {}).get(match[3])
            if content is None:
                return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self._send(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        return self._json({"error": f"no such address: {self.path}"}, 404)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, code)

    def _send(self, content: bytes, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
