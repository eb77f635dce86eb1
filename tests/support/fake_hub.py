"""A local server that imitates the hub, and misbehaves when told to.

It answers the requests that spafit makes: for a revision (``/api/models/...``), and ``HEAD`` and
``GET`` of a file (``/owner/name/resolve/...``). And those by which huggingface_hub makes a
repository and a commit: ``create``, ``validate-yaml``, ``preupload``, ``batch`` and ``PUT`` of what
is large, ``verify``, ``commit``. It records every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from support.file_server import Faults

NAME = "acme/tiny-bert"
FIRST, SECOND = "1" * 40, "2" * 40
WRITES = {  # a part of the path -> what answers it
    "repos/create": "create",
    "validate-yaml": "validate",
    "preupload": "preupload",
    "info/lfs/objects/batch": "batch",
    "upload": "",
    "verify": "verify",
    "commit": "",
}


class FakeHub(ThreadingHTTPServer):
    """One repository, two commits; ``main`` is the first until a test moves it."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {FIRST: files, SECOND: {**files, "vocab.txt": b"another\n"}}
        self.revisions = {"main": FIRST, "v2": SECOND, FIRST: FIRST, SECOND: SECOND}
        self.requests: list[str] = []
        self.ranges: dict[str, list[str | None]] = {}  # file -> what was asked for of it
        self.status = 200  # of the question what a revision is
        self.error_code = ""
        self.answer: bytes | None = None  # in place of the right one
        self.cut_short: dict[str, int] = {}  # file -> how many more times it breaks off half-way
        self.dropped: set[str] = set()  # files in place of which the connection is closed
        self.faults: dict[str, list[str]] = {}  # file -> faults of its next answers, in order
        self.tags: dict[str, str] = {}  # headers in place of the right ones
        self.siblings: list[dict[str, object]] = []  # further files that are said to be there
        self.halved: set[str] = set()  # files of which half is sent as if it were the whole
        self.flipped: set[str] = set()  # files that arrive with one bit changed
        self.token = ""  # without it, nothing is taken; empty: nobody may write
        self.refused: dict[str, int] = {}  # kind of a request that writes -> status
        self.broken: set[str] = set()  # kinds in the middle of which the connection is closed
        self.made: list[dict[str, object]] = []  # what was asked for, when a repository was made
        self.sent: list[tuple[str, str, bytes]] = []  # every request that writes: path, head, body
        self.uploaded: dict[str, bytes] = {}  # SHA-256 -> content, not committed yet
        self.silence = threading.Event()
        self.release = threading.Event()
        self.released = threading.Event()  # a stalled answer waits for it
        self.released.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client hangs up, which tests provoke."""


class Handler(Faults):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            hub.released.wait(20)
            self.describe(path.partition("/revision/")[2])
            return
        _, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = hub.revisions[revision]
        content = hub.files[commit][name]
        tag = {"ETag": f'"{git_hash(content)}"', "X_Repo_Commit": commit}
        if name.endswith(".safetensors"):
            tag["X_Linked_Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            tag["X_Linked_Size"] = str(len(content))
        tag |= hub.tags
        wanted = self.headers.get("Range")
        if self.command == "GET":
            hub.ranges.setdefault(name, []).append(wanted)
        if self.command == "GET" and hub.faults.get(name):
            self.misbehave(hub.faults[name].pop(0), content, wanted)
            return
        if self.command == "GET" and hub.cut_short.get(name, 0):
            hub.cut_short[name] -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if self.command == "GET" and name in hub.dropped:
            self.close_connection = True
            return
        if self.command == "GET" and name in hub.halved:
            content = content[: len(content) // 2]
        if name in hub.flipped:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.reply(200, content, **tag)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        kind = next(each for each in WRITES if f"/{each}" in path)
        hub.requests.append(f"{self.command} {path}")
        if kind in hub.broken:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.close()
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.sent.append((path, str(self.headers), body))
        allowed = f"Bearer {hub.token}" if hub.token else None
        if kind != "upload" and self.headers.get("Authorization") != allowed:
            self.reply(401, b'{"error": "Invalid username or password."}')
        elif kind in hub.refused:
            self.reply(hub.refused[kind], b'{"error": "no"}')
        elif kind == "upload":
            hub.uploaded[hashlib.sha256(body).hexdigest()] = body
            self.reply(200, b"")
        elif kind == "commit":
            self.commit(path, [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(200, json.dumps(getattr(self, WRITES[kind])(json.loads(body))).encode())

    do_PUT = do_POST

    def create(self, asked: dict[str, object]) -> object:
        self.server.made.append(asked)
        return {"url": f"{self.server.endpoint}/{asked['organization']}/{asked['name']}"}

    def validate(self, asked: dict[str, object]) -> object:
        return {"errors": [], "warnings": []}

    def verify(self, asked: dict[str, str]) -> object:
        assert asked["oid"] in self.server.uploaded
        return {}

    def preupload(self, asked: dict[str, list[dict[str, str]]]) -> object:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        return {"files": files}

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> object:
        address = self.server.endpoint
        objects = [
            {
                **each,
                "actions": {
                    "upload": {"href": f"{address}/upload/{each['oid']}?signed=secret"},
                    "verify": {"href": f"{address}/verify"},
                },
            }
            for each in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, path: str, lines: list[dict[str, dict[str, str]]]) -> None:
        """Add the files of a commit to those of main, which is then at a new commit."""
        hub = self.server
        files = dict(hub.files[hub.revisions["main"]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.uploaded[value["oid"]]
        content = b"".join(name.encode() + each for name, each in sorted(files.items()))
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        hub.files[commit], hub.revisions["main"], hub.revisions[commit] = files, commit, commit
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        address = f"{hub.endpoint}/{name}/commit/{commit}"
        answer = {"commitUrl": address, "commitOid": commit}
        self.reply(200, json.dumps(answer).encode())

    def describe(self, revision: str) -> None:
        hub = self.server
        if hub.status != 200:
            self.reply(hub.status, b"{}", X_Error_Code=hub.error_code)
            return
        if hub.answer is not None:
            self.reply(200, hub.answer)
            return
        if revision not in hub.revisions:
            self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
            return
        commit = hub.revisions[revision]
        siblings = [*hub.siblings]
        for name, content in hub.files[commit].items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 99}
            siblings.append(sibling)
        self.reply(200, json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode())


def git_hash(content: bytes) -> str:
    content = b"blob %d\0" % len(content) + content
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
