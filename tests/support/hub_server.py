"""A server on loopback that speaks the hub's protocol as far as its clients need it: names, trees, files, ranges.

Repositories are values with commits and branches; faults are values too, taken in order by the requests they match.
What was asked is written down, with the bytes of each answer.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

WRITES = re.compile(r"/api/datasets/([^/]+/[^/]+)/(preupload|commit)/([^/]+)")
LARGE = 1_000_000
"""Files from here on are kept as the hub keeps large ones: known by their sha256, served after a redirect."""


def commit_id(name: str) -> str:
    """A commit, as the hub writes them."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Repo:
    """A repository: commits -> files, branches -> commits."""

    kind: str  # models or datasets
    id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool | str = False
    tokens: tuple[str, ...] = ()
    """Whom a gated or private repository lets in."""
    listed: bool = True
    """Whether its info lists its files."""
    writers: tuple[str, ...] = ()
    """Whose commits it takes."""
    large: str = ""
    """Names of files (a pattern) that it keeps as large ones whatever their size, as .gitattributes says on the hub."""
    modified: float | None = 1_750_000_000.0
    """When the newest commit was made, by the hub's clock; None: it does not say."""

    def commit(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens instead, to the first `times` requests from the `after`-th on whose `METHOD path` matches."""

    match: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the body after which the connection is closed."""
    stall_after: int | None = None
    """Bytes of the body after which nothing more comes, until the client is gone."""
    replace: bytes | None = None
    """Another body of the same length."""
    lost: bool = False
    """A commit is carried out, and the connection closed without an answer."""
    after: int = 0
    times: int = 1


@dataclass(frozen=True)
class Asked:
    """One request as it was answered. `sent`: bytes of the body."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int


@dataclass
class Hub:
    """The server's side: what it holds, what it does wrong, what it was asked."""

    repos: list[Repo] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256, which commits name."""
    page: int = 1000
    """Names in one answer of a tree; further ones are linked."""
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, kind: str, name: str) -> Repo | None:
        return next((repo for repo in self.repos if (repo.kind, repo.id) == (kind, name)), None)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, request):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def requests(self, match: str = "") -> list[Asked]:
        with self.lock:
            return [asked for asked in self.asked if re.search(match, f"{asked.method} {asked.path}")]

    def sent(self, match: str = "") -> int:
        """Bytes of the bodies of files that went out."""
        return sum(asked.sent for asked in self.requests(match))

    def forget(self) -> None:
        with self.lock:
            self.asked.clear()
            self.faults.clear()


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.fault = self.hub.fault(f"{self.command} {path}")
        self.answered, self.sent = 0, 0
        try:
            if self.fault and self.fault.status:
                self.answer(self.fault.status, b"{}", self.fault.headers)
            else:
                self.route(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            done = Asked(self.command, path, self.headers.get("Range"), self.answered, self.sent)
            with self.hub.lock:
                self.hub.asked.append(done)

    do_HEAD = do_GET

    def do_POST(self):
        self.given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    do_PUT = do_POST

    def route(self, path):
        if cdn := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self.upload(cdn[1]) if self.command == "PUT" else self.large(cdn[1])
        if self.command == "POST" and (written := WRITES.fullmatch(path)):
            return self.write(*written.groups())
        if self.command == "POST" and (
            batch := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        ):
            return self.batch(batch[1])
        if api := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|auth-check)(?:/(.+))?)?", path):
            return self.api(*api.groups())
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file("datasets" if file[1] else "models", *file.groups()[1:])
        return self.refuse(404, "RepoNotFound")

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def api(self, kind, name, what, rest):
        repo = self.hub.find(kind, name)
        if self.token() == "wrong":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and self.token() not in repo.tokens):
            return self.refuse(401 if not self.token() else 404, "RepoNotFound")
        if what == "auth-check" and rest == "write":
            return self.json({}) if self.token() in repo.writers else self.refuse(403, None, "no write access")
        if what == "auth-check":
            return self.gate(repo) or self.json({})
        revision, _, folder = (rest or "main").partition("/") if what == "tree" else (rest or "main", "", "")
        commit = repo.commit(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        files = repo.commits[commit]
        if what == "tree":
            return self.gate(repo) or self.pages(repo, files, folder)
        info = {"id": repo.id, "sha": commit, "private": repo.private, "gated": repo.gated}
        if repo.modified is not None:
            info["lastModified"] = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(repo.modified))
        if repo.listed:
            info["siblings"] = [self.sibling(path, data) for path, data in files.items()]
        return self.json(info)

    def gate(self, repo):
        """Whether the request was refused because of the gate."""
        if repo.gated and self.token() not in repo.tokens:
            self.refuse(403 if self.token() else 401, "GatedRepo")
            return True
        return False

    def pages(self, repo, files, folder):
        """A page of a tree, with a link to the next one."""
        if folder and not any(path.startswith(f"{folder}/") for path in files):
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        found, asked = self.tree(repo, files, folder), parse_qs(urlsplit(self.path).query)
        begin = int(asked.get("cursor", ["0"])[0])
        more = {}
        if begin + self.hub.page < len(found):
            query = urlencode({name: value[0] for name, value in asked.items()} | {"cursor": begin + self.hub.page})
            more = {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'}
        body = json.dumps(found[begin : begin + self.hub.page]).encode()
        return self.answer(200, body, {"Content-Type": "application/json", **more})

    def write(self, name, what, revision):
        """What a commit takes: how each file is to be uploaded, then all of it at once upon the head that it names."""
        repo = self.hub.find("datasets", name)
        if repo is None or (repo.private and self.token() not in repo.tokens):
            return self.refuse(401 if not self.token() else 404, "RepoNotFound")
        if self.token() not in repo.writers:
            return self.refuse(403, None, "Forbidden: pass create_pr=1 as a query parameter to create a Pull Request")
        with self.hub.lock:
            return self.preupload(repo) if what == "preupload" else self.commit(repo, revision)

    def preupload(self, repo):
        head = repo.commits[repo.branches["main"]]
        rules = [line.strip() for line in head.get(".gitignore", b"").decode().splitlines() if line.strip()]
        told = []
        for file in json.loads(self.given)["files"]:
            path = file["path"]
            known = {"oid": git_id(head[path])} if path in head and not self.is_large(repo, path, head[path]) else {}
            ignored = any(fnmatch(path.rpartition("/")[2], rule) for rule in rules)
            mode = "lfs" if file["size"] >= LARGE or (repo.large and re.search(repo.large, path)) else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, **known})
        return self.json({"files": told})

    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.given.splitlines() if line.strip()]
        head, parent = repo.branches[revision], lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head:
            return self.refuse(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.uploaded:
                    return self.refuse(400, None, "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif files.pop(value["path"], None) is None:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        made = commit_id(f"{head} {self.given.decode()}")
        repo.commits[made], repo.branches[revision], repo.modified = files, made, time.time()
        if self.fault and self.fault.lost:
            self.close_connection = True  # it is done, and no answer says so
            return self.connection.close()
        url = f"{self.hub.url}/datasets/{repo.id}/commit/{made}"
        return self.json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def batch(self, name):
        """Where large files go, as the LFS protocol says it."""
        repo = self.hub.find("datasets", name)
        if repo is None or self.token() not in repo.writers:
            return self.refuse(403, None)
        objects = []
        for item in json.loads(self.given)["objects"]:
            place = {"upload": {"href": f"{self.hub.url}/cdn/{item['oid']}?Signature=secret"}}
            objects.append(item | ({} if item["oid"] in self.hub.uploaded else {"actions": place}))
        return self.json({"transfer": "basic", "objects": objects})

    def upload(self, digest):
        assert sha256(self.given) == digest
        self.hub.uploaded[digest] = self.given
        return self.answer(200, b"", {})

    def is_large(self, repo, path, data):
        return len(data) >= LARGE or bool(repo.large and re.search(repo.large, path))

    def tree(self, repo, files, folder):
        recursive = "recursive=true" in self.path.lower()
        prefix, found = f"{folder}/" if folder else "", {}
        for path, data in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                found[name] = {"type": "directory", "path": name, "oid": commit_id(name), "size": 0}
            if recursive or len(parts) == 1:
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
                if self.is_large(repo, path, data):
                    entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
                found[path] = entry
        return list(found.values())

    def sibling(self, path, data):
        large = {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}} if len(data) >= LARGE else {}
        return {"rfilename": path, "size": len(data), "blobId": git_id(data), **large}

    def file(self, kind, name, revision, path):
        repo = self.hub.find(kind, name)
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        commit = repo.commit(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if self.gate(repo):
            return None
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        data = repo.commits[commit].get(path)
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", **headers})
        if not self.is_large(repo, path, data):
            return self.body(data, {**headers, "ETag": f'"{git_id(data)}"'})
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256(data)}"'}
        # another name, as the hub's large files lie on another host: no token is sent there
        place = {"Location": f"{self.hub.url}/cdn/{sha256(data)}?Signature=secret".replace("127.0.0.1", "localhost")}
        return self.answer(302, b"", {**headers, **linked, **place})

    def large(self, digest):
        assert "Authorization" not in self.headers
        files = (data for repo in self.hub.repos for commit in repo.commits.values() for data in commit.values())
        kept = self.hub.uploaded.get(digest)
        data = kept if kept is not None else next(d for d in files if len(d) >= LARGE and sha256(d) == digest)
        return self.body(data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def body(self, data, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.fault and self.fault.replace is not None:
            data = self.fault.replace
        if not wanted:
            return self.answer(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self.answer(
            206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        )

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code, message=None):
        known = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, b"{}", {name: value for name, value in known.items() if value})

    def answer(self, status, data, headers):
        self.answered = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, stall = (self.fault.cut_after, self.fault.stall_after) if self.fault else (None, None)
        end = min(len(data), *(limit for limit in (cut, stall) if limit is not None), len(data))
        for begin in range(0, end, 1 << 18):
            self.sent += self.wfile.write(data[begin : min(begin + (1 << 18), end)])
        self.wfile.flush()
        if end < len(data):
            self.close_connection = True
            if stall is not None:
                self.wait_for_the_end()

    def wait_for_the_end(self):
        self.connection.settimeout(60)
        self.connection.recv(1)  # nothing comes, until the client's end of the connection closes

    def log_message(self, *_):
        pass


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def hub_server(*repos: Repo) -> Iterator[Hub]:
    """A hub with these repositories, at `hub.url`."""
    hub = Hub(list(repos))
    handler = type("Bound", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def client_environment(url: str, home, **more: str) -> dict[str, str]:
    """The environment of a process whose hub is `url` and whose cache is `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def wait_until(true, seconds=30.0):
    """Poll until `true()` says so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
