"""A moto server with a proxy in front of it that breaks answers as told: real HTTP, real sockets.

A plan says for each request which fault it meets, if any. `applied` faults let the server do its work
first, so that only the answer is lost.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

BUCKET = "faulty"  # a moto server's buckets are those of the whole process


@dataclass(frozen=True)
class Fault:
    """What a request meets: a status with an error code, or without a status a broken connection."""

    status: int = 0
    code: str = ""  # of the XML body; none where empty
    applied: bool = False  # the server has done what it was asked
    silence: float = 0.0  # seconds before the connection breaks
    cut: bool = False  # half of the true answer's body, then the connection breaks


RESET, LOST = Fault(), Fault(applied=True)
SLOW_DOWN = Fault(503, "SlowDown")
BAD = {
    "500": Fault(500, "InternalError"),
    "502 from something in between": Fault(502),
    "503": SLOW_DOWN,
    "429": Fault(429, "TooManyRequests"),
    "no answer": Fault(silence=0.8),
    "reset": RESET,
    "reset once applied": LOST,
    "500 once applied": Fault(500, "InternalError", applied=True),
    "no answer once applied": Fault(silence=0.8, applied=True),
    "cut": Fault(applied=True, cut=True),
}


@dataclass(frozen=True)
class Request:
    """A request as the proxy sees it."""

    method: str
    key: str  # without the bucket, unescaped
    query: frozenset[str]  # names of the parameters
    access_key: str
    at: float = field(default_factory=time.monotonic)

    @property
    def kind(self) -> str:
        """`PUT`, `POST uploads`, `POST uploadId`, `PUT partNumber`, `POST delete`, `GET list-type`, ..."""
        told = ("uploads", "partNumber", "uploadId", "delete", "list-type")
        return " ".join([self.method, *(name for name in told if name in self.query)][:2])


Plan = Callable[[Request], "Fault | None"]


class FaultyS3:
    """The proxy. `plan` may be set at any time; `valid` are the access keys that are let through."""

    def __init__(self, host: str, port: int) -> None:
        self.upstream = (host, port)
        self.plan: Plan = lambda request: None
        self.valid: set[str] | None = None
        self.seen: list[Request] = []
        self.faults = 0
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        self.plan, self.valid, self.faults = (lambda request: None), None, 0
        self.seen.clear()

    def count(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.seen)

    def judged(self, request: Request) -> Fault | None:
        self.seen.append(request)
        if self.valid is not None and request.access_key not in self.valid:
            return Fault(400, "ExpiredToken")
        return self.plan(request)


def first(times: int, fault: Fault, kind: str = "") -> Plan:
    """The first requests of each kind for each key meet `fault`."""
    left: dict[tuple[str, str], int] = {}
    lock = threading.Lock()

    def plan(request: Request) -> Fault | None:
        if kind and request.kind != kind:
            return None
        which = request.kind, request.key
        with lock:
            left[which] = left.get(which, times) - 1
            return fault if left[which] >= 0 else None

    return plan


def at_random(seed: int, rate: float) -> Plan:
    """A share of the requests meets one of the faults."""
    rng, lock = random.Random(seed), threading.Lock()

    def plan(request: Request) -> Fault | None:
        with lock:
            return rng.choice(list(BAD.values())) if rng.random() < rate else None

    return plan


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyS3
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do(self) -> None:
        data = self._body()
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").lstrip("/")
        found = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        query = frozenset(parse_qs(parts.query, keep_blank_values=True))
        request = Request(self.command, key, query, found[1] if found else "")
        fault = self.owner.judged(request)
        answer = None if fault and not fault.applied else self._forward(data)
        if fault is None:
            assert answer is not None
            self._answer(*answer)
            return
        self.owner.faults += 1
        if fault.status:
            text = (
                f"<Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>"
                if fault.code
                else ""
            )
            self._answer(fault.status, [("Content-Type", "application/xml")], text.encode())
            return
        if fault.cut and answer is not None:
            self._answer(*answer, share=0.5)
        time.sleep(fault.silence)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _forward(self, data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.owner.upstream)
        headers = {
            k: v for k, v in self.headers.items() if k not in ("Transfer-Encoding", "Expect", "Connection")
        }
        headers["Content-Length"] = str(len(data))
        connection.request(self.command, self.path, data, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), body

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, share: float = 1.0) -> None:
        with contextlib.suppress(OSError):  # the client may have gone
            self.send_response_only(status)
            size = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    size = value
                elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", size)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body[: int(len(body) * share)])
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(credentials: Path) -> Iterator[FaultyS3]:
    """A bucket behind the proxy, and this process's environment set for it; keys are in `credentials`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    from pipelines.s3 import PatientS3

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    proxy = FaultyS3(*server.get_host_and_port())
    write_keys(credentials, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN",
                     "HTTP_PROXY", "http_proxy"):  # fmt: skip
            patch.delenv(name, raising=False)
        PatientS3.clear_instance_cache()
        with contextlib.suppress(FileExistsError):
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        yield proxy
    PatientS3.clear_instance_cache()
    proxy.stop()
    server.stop()


def write_keys(file: Path, key: str) -> None:
    """Credentials as another program renews them: whole, by rename."""
    new = file.with_suffix(".new")
    new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")
    new.replace(file)
