"""A stand-in for the Hugging Face hub on this machine: what uploads and snapshot downloads of small files ask for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """files: content by path in the only repository. requests: method, path and JSON of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, object]] = []
        self.tokens: set[str | None] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        self.server.requests.append(("POST", self.path, lines))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self._json({"url": f"{self.server.url}/{lines[0].get('organization', 'me')}/{lines[0]['name']}"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in lines[0]["files"]]
            self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{self.server.url}/me/loras/commit/{SHA}", "commitOid": SHA})
        else:
            self._json({}, 404)

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, None))
        found = re.fullmatch(r"/me/loras/resolve/[^/]+/(.+)", self.path)
        if found and found[1] in self.server.files:
            self._file(self.server.files[found[1]])
        elif re.fullmatch(r"/api/models/me/loras(/revision/.+)?", self.path.split("?")[0]):
            names = [{"rfilename": name} for name in self.server.files]
            self._json({"_id": "1", "id": "me/loras", "sha": SHA, "siblings": names, "private": True, "tags": []})
        elif self.path.startswith("/api/models/me/loras/tree/"):
            self._json([_entry(name, data) for name, data in self.server.files.items()])
        else:
            self._json({"error": "Repository not found"}, 404)

    do_HEAD = do_GET

    def _file(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self._body(data)

    def _json(self, value: object, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._body(json.dumps(value).encode())

    def _body(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers within the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
