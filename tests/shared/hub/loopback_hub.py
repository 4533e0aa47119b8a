"""The Hub's endpoints over HTTP on loopback, with large files by LFS: what pushes and pulls are tested against.

Repositories live in memory.  `Hub.fail` makes answers go wrong: a status, silence, a dropped connection, half a body
with an end or silence after it, or an answer lost after the work was done.  Every request is in `Hub.log`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopbackTokenOfNobody123"
LARGE = ".safetensors"
HANG, RESET, SHORT, LOST, STALL = "hang", "reset", "short", "lost", "stall"


def blob_id(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits by id, and the branches that lead to them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        listed = sorted((name, blob_id(data)) for name, data in files.items())
        made = hashlib.sha1(json.dumps([len(self.commits), listed]).encode()).hexdigest()
        self.commits[made] = files
        self.branches[branch] = made
        self.messages.append(message)
        return made

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the branch main."""
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """One way to go wrong, for so many requests that match."""

    method: str
    path: str
    kind: int | str
    times: int
    headers: dict[str, str]


class Hub:
    """The server.  Use as a context manager; `url` is what HF_ENDPOINT would be."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.sent: list[bytes] = []
        """Bodies of every request: what has left this machine."""
        self.token_seen_at: set[str] = set()
        """Kinds of requests that carried the token: `api`, `storage`."""
        self.may_write = True
        self.faults: list[Fault] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """A repository with one commit; returns its id."""
        self.repositories[name] = Repository(private)
        return self.repositories[name].commit(dict(files))

    def fail(self, method: str, path: str, kind: int | str, times: int = 1, **headers: str) -> None:
        """The next `times` requests of a method whose path matches a pattern go wrong."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, path, kind, times, named))

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, pattern: str) -> list[str]:
        return [path for seen, path in self.log if seen == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    """One connection.  `route` gives (status, body, headers) of a request that nothing goes wrong with."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        body = self.body()
        hub = self.hub
        with hub.lock:
            hub.log.append((self.command, path))
            hub.sent.append(body)
            if TOKEN in self.headers.get("Authorization", ""):
                hub.token_seen_at.add("storage" if path.startswith("/storage/") else "api")
        fault = hub.fault_of(self.command, path)
        kind = fault.kind if fault else None
        if kind == HANG:
            hub.closing.wait(60)
            return self.drop()
        if kind == RESET:
            return self.drop()
        if isinstance(kind, int):
            assert fault is not None
            return self.answer(kind, {"error": f"told to answer {kind}"}, fault.headers)
        with hub.lock:
            status, content, headers = self.route(path, query, body)
        if kind == LOST:
            return self.drop()
        self.answer(status, content, headers, kind)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(
        self, status: int, content: Any, headers: dict[str, str] | None = None, kind: int | str | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if kind in (SHORT, STALL) else data)
        if kind == STALL:
            self.hub.closing.wait(60)
        if kind in (SHORT, STALL):
            self.drop()

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path.startswith("/storage/"):
            return self.storage(path.rsplit("/", 1)[-1], body)
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        writes = self.command == "POST" and re.search(r"/(create|commit|branch|preupload|batch)(/|$)", path)
        if writes and given is None:
            return 401, {"error": "Invalid username or password."}, {}
        if writes and not self.hub.may_write:
            return 403, {"error": "You don't have the rights to write here."}, {}
        if path == "/api/whoami-v2":
            return 200, {"name": "user", "type": "user", "orgs": []}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        return self.of_repository(path, query, body)

    def storage(self, digest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != digest:
            return 400, {"error": "not the bytes that were announced"}, {}
        self.hub.stored[digest] = body
        return 200, {}, {}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, {}
        self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{name}"}, {}

    def of_repository(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        found = re.fullmatch(
            r"/(?:api/models/)?(?P<name>[^/]+/[^/]+?)(?:\.git/info)?"
            r"(?:/(?P<verb>resolve|revision|tree|preupload|commit|branch|lfs)(?:/(?P<rest>.*))?)?",
            path,
        )
        repository = self.hub.repositories.get(found["name"]) if found else None
        if found is None or repository is None or (repository.private and not self.headers.get("Authorization")):
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        verb, rest = found["verb"] or "revision", found["rest"] or "main"
        if verb == "lfs":
            return self.batch(json.loads(body))
        if verb == "branch":
            start = json.loads(body or b"{}").get("startingPoint", "main")
            repository.branches[rest] = repository.branches.get(start, start)
            return 200, {}, {}
        pull = re.match(r"refs/pr/\d+", rest)
        revision, _, file = (pull[0], "/", rest[len(pull[0]) + 1 :]) if pull else rest.partition("/")
        commit = repository.find(revision)
        if commit is None:
            return 404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"}
        files = repository.commits[commit]
        if verb == "resolve":
            return self.resolve(files, commit, file)
        if verb == "preupload":
            return 200, {"files": [_mode(one["path"], files) for one in json.loads(body)["files"]]}, {}
        if verb == "commit":
            return self.commit(found["name"], repository, revision, commit, "create_pr" in query, body)
        if verb == "tree":
            return 200, [_listed(name, data) for name, data in sorted(files.items())], {}
        about = {"_id": "1", "id": found["name"], "modelId": found["name"], "sha": commit, "tags": []}
        siblings = [{"rfilename": name} for name in sorted(files)]
        return 200, {**about, "private": repository.private, "siblings": siblings, "downloads": 0, "likes": 0}, {}

    def resolve(self, files: dict[str, bytes], commit: str, file: str) -> tuple[int, Any, dict[str, str]]:
        if file not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        data, status = files[file], 200
        digest = hashlib.sha256(data).hexdigest() if file.endswith(LARGE) else blob_id(data)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(data))}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data = data[first:]
        return status, data, headers

    def batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}", "header": {}}}
            there = one["oid"] in self.hub.stored
            objects.append({"oid": one["oid"], "size": one["size"], **({} if there else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def commit(
        self, name: str, repository: Repository, branch: str, head: str, as_pull: bool, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        files, message = dict(repository.commits[head]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    return 400, {"error": f"no object {value['oid']}"}, {}
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        pulls = sum(one.startswith("refs/pr/") for one in repository.branches)
        made = repository.commit(files, f"refs/pr/{pulls + 1}" if as_pull else branch, message)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made}
        if as_pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{pulls + 1}"
        return 200, answer, {}


def _mode(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    large = name.endswith(LARGE)
    there = {} if name not in files else {"oid": _digest(name, files[name])}
    return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **there}


def _digest(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else blob_id(data)


def _listed(name: str, data: bytes) -> dict[str, Any]:
    found = {"type": "file", "path": name, "oid": blob_id(data), "size": len(data)}
    if not name.endswith(LARGE):
        return found
    digest = hashlib.sha256(data).hexdigest()
    return {**found, "lfs": {"oid": digest, "size": len(data), "pointerSize": 134}}
