"""A Hugging Face Hub on loopback, in memory: what the client needs to push and pull a file."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopback"
_COMMIT = "0" * 40


class Hub:
    """Repositories by name: files by name, and which are private."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        hub, content = self.hub, self._content()
        hub.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif not self._owner():
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            fields = json.loads(content)
            name = f"{fields['organization']}/{fields['name']}"
            if fields["organization"] != "me":
                self._answer(403, {"error": "not your namespace"})
                return
            if name in hub.files:
                self._answer(409, {"url": f"{hub.address}/{name}"})
                return
            hub.files[name] = {}
            if fields.get("private") or fields.get("visibility") == "private":
                hub.private.add(name)
            self._answer(200, {"url": f"{hub.address}/{name}", "name": name})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "regular" if file["path"].endswith(".md") else "lfs",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**of, "actions": {"upload": {"href": f"{hub.address}/large/{of['oid']}"}}}
                for of in json.loads(content)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self._commit(hub.files[match[1]], content)
            url = f"{hub.address}/{match[1]}/commit/{_COMMIT}"
            self._answer(200, {"success": True, "commitOid": _COMMIT, "commitUrl": url})
        else:
            self._answer(404, {"error": self.path})

    def _commit(self, files: dict[str, bytes], content: bytes) -> None:
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]

    def do_PUT(self) -> None:
        content, oid = self._content(), self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self._answer(200)

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append(f"{self.command} {self.path}")
        match = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", self.path)
        name, revision, file = match.groups() if match else ("", "", "")
        if name not in hub.files or (name in hub.private and not self._owner()):
            self._answer(404, X_Error_Code="RepoNotFound")
        elif revision not in ("main", _COMMIT):
            self._answer(404, X_Error_Code="RevisionNotFound")
        elif file not in hub.files[name]:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=_COMMIT)
        else:
            content = hub.files[name][file]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._answer(200, content, ETag=etag, X_Repo_Commit=_COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()


@contextlib.contextmanager
def served() -> Iterator[Hub]:
    """Serves an empty hub on a free port of the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
