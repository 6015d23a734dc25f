"""A server on this machine that speaks what huggingface_hub asks of a hub, and serves plain files too.

Folders are served as commits of repositories. Large files are redirected as the hub redirects them, with
the digest of their bytes in the listing. Every request is recorded with the bytes that went out.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 2048  # bytes from which a file is redirected
PAGE = 5  # entries of a page of a listing


@dataclass(frozen=True)
class Request:
    """One request: what was asked for, and the bytes of the answer's body."""

    method: str
    path: str
    range: str | None
    sent: int
    status: int


@dataclass
class Repo:
    """Commits are folders; refs name them."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


@dataclass
class Hub:
    """A running server. `files` is served as plain files under /files/, with ranges if `ranges`."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    files: Path | None = None
    ranges: bool = True
    requests: list[Request] = field(default_factory=list)

    def push(self, repo: str, folder: Path, ref: str = "main") -> str:
        """Serve a folder as the newest commit of a branch: its name."""
        known = self.repos.setdefault(repo, Repo())
        sha = hashlib.sha1(f"{repo} {len(known.commits)}".encode()).hexdigest()
        known.commits[sha], known.refs[ref] = folder, sha
        return sha

    def sent(self, word: str = "") -> int:
        """Bytes sent for paths that hold `word`."""
        return sum(request.sent for request in self.requests if word in request.path)

    def asked(self, word: str = "") -> list[Request]:
        """Requests for paths that hold `word`."""
        return [request for request in self.requests if word in request.path]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub without repositories."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing: what was asked is in `Hub.requests`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "files":
            self._plain("/".join(parts[1:]))
        elif parts[0] == "cdn":
            self._bytes(Path("/" + "/".join(parts[1:])), {})
        elif parts[:2] == ["api", "models"]:
            self._api(parts[2:], parse_qs(url.query), body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve(parts)
        else:
            self._answer(404, b"", {})

    def _api(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        name, rest = "/".join(parts[:2]), parts[2:] or ["revision", "main"]
        found = self._commit(name, rest[1])
        if found is None:
            return
        sha, folder = found
        if rest[0] == "revision":
            self._json({"id": name, "sha": sha, "siblings": [], "private": False})
        elif rest[0] == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self._json([_entry(folder, folder / path) for path in wanted if (folder / path).is_file()])
        else:
            top = folder / "/".join(rest[2:])
            if not top.is_dir():
                self._error(404, "EntryNotFound")
                return
            assert query["recursive"] == ["true"] or query["recursive"] == ["True"]
            every = sorted(top.rglob("*"))
            at = int(query.get("cursor", ["0"])[0])
            more = at + PAGE < len(every)
            path = urlsplit(self.path).path
            url = f"{self.state.endpoint}{path}?recursive=True&expand=False&cursor={at + PAGE}"
            self._json(
                [_entry(folder, path) for path in every[at : at + PAGE]],
                {"Link": f'<{url}>; rel="next"'} if more else {},
            )

    def _resolve(self, parts: list[str]) -> None:
        name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = self._commit(name, revision)
        if found is None:
            return
        if self.state.repos[name].gated:
            self._error(401, "GatedRepo")
            return
        sha, folder = found
        file = folder / path
        if not file.is_file():
            self._error(404, "EntryNotFound")
            return
        entry = _entry(folder, file)
        if "lfs" not in entry:
            self._bytes(file, {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'})
            return
        elsewhere = self.state.endpoint.replace("127.0.0.1", "localhost")  # as the hub's redirects lead away
        linked = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        self._answer(302, b"", {"X-Repo-Commit": sha, "Location": f"{elsewhere}/cdn{file}", **linked})

    def _commit(self, name: str, revision: str) -> tuple[str, Path] | None:
        repo = self.state.repos.get(name)
        if repo is None:
            self._error(401, "RepoNotFound")
            return None
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self._error(404, "RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    def _plain(self, path: str) -> None:
        assert self.state.files is not None
        file = self.state.files / path
        if file.is_dir():
            names = (entry.name + "/" * entry.is_dir() for entry in sorted(file.iterdir()))
            page = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
            self._answer(200, page.encode(), {"Content-Type": "text/html"})
        elif file.is_file():
            self._bytes(file, {"ETag": f'"{_digest(file)}"'})
        else:
            self._answer(404, b"", {})

    def _bytes(self, file: Path, headers: dict[str, str]) -> None:
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or not self.state.ranges:
            self._answer(200, data, headers)
            return
        start, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        place = {"Content-Range": f"bytes {start}-{last}/{len(data)}"}
        self._answer(206, data[start : last + 1], {**headers, **place})

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        sent = 0 if self.command == "HEAD" else len(body)
        self.state.requests.append(Request(self.command, self.path, self.headers.get("Range"), sent, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        if self.state.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if sent:
            self.wfile.write(body)


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    size = path.stat().st_size
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": _digest(path)[:40], "size": size}
    if size >= LARGE:
        entry["lfs"] = {"oid": _digest(path), "size": size, "pointerSize": 134}
    return entry


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
