"""A stand-in for the model hub: the part of its HTTP interface that the client libraries use, on loopback.

What it answers was read from the requests of huggingface_hub 2.4: the repository at a revision, the tree of a commit,
and the files, whose contents come from another host than the hub itself (as the real ones do), with ranges. There is
nothing of the hub's chunked storage (xet): files say nothing of it, so that clients fetch them over HTTP. It takes
commits, too, from clients that have HF_HUB_DISABLE_XET: large files by Git LFS's batch interface, small ones within.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/(?P<under>.+))?)?"
)
_UPLOAD = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Request:
    """One request as the server saw it: `range` is the Range header, "" without one."""

    method: str
    path: str
    range: str
    authorized: bool


@dataclass
class Hub:
    """Serves repositories inside a `with`; `url` is what HF_ENDPOINT has to be.

    `breaks` holds, by file name, after how many bytes the connection of each coming GET is cut (first one first);
    `resets`: by an error on the connection instead of its regular end.
    """

    requests: list[Request] = field(default_factory=list)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    resets: bool = False
    _commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    _refs: dict[str, dict[str, str]] = field(default_factory=dict)
    _gated: dict[str, str] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    """Tokens that may make repositories and write to them."""
    private: dict[str, bool] = field(default_factory=dict)
    """Repositories that clients made."""
    _large: dict[str, bytes] = field(default_factory=dict)

    def files(self, name: str) -> Files:
        """What a client has written to the model `name`."""
        return self._commits[name][self._refs[name]["main"]]

    def add(self, name: str, files: Files, revision: str = "main", *, token: str | None = None) -> str:
        """Put a commit on a branch of the model `name`, or of "datasets/ORG/NAME"; returns its hash.

        With `token` the repository is gated: only requests that bear it are let in.
        """
        told = b"".join(path.encode() + hashlib.sha1(content).digest() for path, content in sorted(files.items()))
        commit = hashlib.sha1(name.encode() + told).hexdigest()
        self._commits.setdefault(name, {})[commit] = files
        self._refs.setdefault(name, {})[revision] = commit
        if token is not None:
            self._gated[name] = token
        return commit

    def downloads(self) -> Counter[str]:
        """How often the contents of each file were asked for, by the file's name."""
        return Counter(r.path.rpartition("/")[2] for r in self.requests if r.path.startswith("/cdn/"))

    def ranges(self, file: str) -> list[str]:
        """The ranges in which the contents of `file` were asked for, in order."""
        return [r.range for r in self.requests if r.path.startswith("/cdn/") and r.path.endswith(f"/{file}")]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def folder_files(folder: Path) -> Files:
    """The files of a folder, by their names in it."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


class _Refused(Exception):
    """status, X-Error-Code, X-Error-Message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(
            Request(self.command, unquote(path), self.headers.get("Range", ""), "Authorization" in self.headers)
        )
        try:
            if self.command in ("POST", "PUT"):
                self._written(unquote(path), self.rfile.read(int(self.headers.get("Content-Length", 0))))
            elif path.startswith("/cdn/"):
                self._contents(path.removeprefix("/cdn"))
            elif match := _FILE.fullmatch(path):
                self._where(match)
            elif match := _API.fullmatch(path):
                self._described(match)
            else:
                raise _Refused(404, "", f"the stand-in has no {path}")
        except _Refused as refused:
            status, code, message = refused.args
            told = json.dumps({"error": message}).encode() if self.command == "POST" else b""
            self._send(status, {"X-Error-Code": code, "X-Error-Message": message}, told)
        except ConnectionError:
            self.close_connection = True

    def _written(self, path: str, body: bytes) -> None:
        """A repository that is made, a commit, and what comes before one."""
        hub = self.server.hub
        if path.startswith("/large/"):
            hub._large[path.removeprefix("/large/")] = body
            self._send(200, {}, b"")
            return
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in hub.writers:
            raise _Refused(403, "", "You don't have the rights to do this")
        told = json.loads(body) if not path.endswith("/commit/main") else {}
        answer: Any = {}
        if path == "/api/repos/create":
            name = f"{told['organization']}/{told['name']}"
            hub.private.setdefault(name, told.get("visibility") == "private" or told.get("private", False))
            answer = {"url": f"{hub.url}/{name}"}
        elif path == "/api/validate-yaml":  # of a model card
            answer = {"errors": [], "warnings": []}
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [{**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in told["objects"]]
            answer = {"transfer": "basic", "objects": objects}
        elif match := _UPLOAD.fullmatch(path):
            if match["what"] == "preupload":
                how = {True: "lfs", False: "regular"}
                files = [(f["path"], how[f["path"].endswith(".safetensors")]) for f in told["files"]]
                answer = {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in files]}
            else:
                commit = hub.add(match["name"], dict(self._committed(body)))
                answer = {"commitUrl": f"{hub.url}/{match['name']}/commit/{commit}", "commitOid": commit}
        else:
            raise _Refused(404, "", f"the stand-in takes no {path}")
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _committed(self, body: bytes) -> Iterator[tuple[str, bytes]]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                yield value["path"], base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                yield value["path"], self.server.hub._large[value["oid"]]

    def _described(self, match: re.Match[str]) -> None:
        """A repository at a revision, or a commit's tree."""
        _, commit, files = self._find(match["kind"].removesuffix("s"), match["name"], match["revision"] or "main")
        body: Any = {"id": match["name"], "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        if match["what"] == "tree":
            body = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
                if match["under"] is None or path.rpartition("/")[0] == match["under"]
            ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _where(self, match: re.Match[str]) -> None:
        """What a file is; its contents are with another host, "localhost"."""
        kind = "dataset" if match["kind"] else "model"
        name, commit, files = self._find(kind, match["name"], match["revision"])
        path = unquote(match["path"])
        if path not in files:
            raise _Refused(404, "EntryNotFound", f"no {path}")
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(files[path])),
            "X-Linked-ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"',
            "Location": f"http://localhost:{self.server.server_port}/cdn/{name}@{commit}/{match['path']}",
        }
        self._send(302, headers, b"")

    def _contents(self, path: str) -> None:
        name, _, rest = unquote(path).removeprefix("/").partition("@")
        commit, _, file = rest.partition("/")
        content = self.server.hub._commits[name][commit][file]
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, last = (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
        partly = start > 0 or last < len(content) - 1
        headers = {"Content-Range": f"bytes {start}-{last}/{len(content)}"} if partly else {}
        cuts = self.server.hub.breaks.get(file, [])
        self._send(206 if partly else 200, headers, content[start : last + 1], cuts.pop(0) if cuts else None)

    def _find(self, kind: str, name: str, revision: str) -> tuple[str, str, Files]:
        hub, revision = self.server.hub, unquote(revision)
        name = f"datasets/{name}" if kind == "dataset" else name
        if name not in hub._commits:
            raise _Refused(401, "RepoNotFound", "Repository not found")  # as the hub says to who is not logged in
        if hub._gated.get(name) is not None and self.headers.get("Authorization") != f"Bearer {hub._gated[name]}":
            known = "Authorization" in self.headers
            message = f"Access to {kind} {name} is restricted" + (
                " and you are not in the authorized list" if known else ""
            )
            raise _Refused(403 if known else 401, "GatedRepo", message)
        commit = hub._refs[name].get(revision, revision)
        if commit not in hub._commits[name]:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name, commit, hub._commits[name][commit]

    def _send(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
            if self.server.hub.resets:  # closing a socket that lingers for 0 s tells the other side of an error
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass
