"""The explorer over an index whose every text means harm, and asked by those who mean it.

Pages are found by following links from the first one, so that a new page is looked at without being named.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import hostile
import psutil
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

import queries
from jobs.explore import explore as command
from pipelines.reading import Reader
from pipelines.status import status
from queries.explorer.app import application
from queries.explorer.session import Outside, open_session
from sae_runtime.errors import InputError

ROOT = Path(__file__).parent.parent
SECURITY = {
    "content-security-policy", "cross-origin-opener-policy", "cross-origin-resource-policy",
    "referrer-policy", "x-content-type-options",
}  # fmt: skip


@pytest.fixture(scope="module")
def app(hostile_index: hostile.Hostile) -> Iterator[Starlette]:
    reader = Reader()
    yield application(open_session([str(hostile_index.index)], Outside(status, reader)))
    reader.close()


@pytest.fixture(scope="module")
def client(app: Starlette) -> TestClient:
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def paths(app: Starlette) -> list[str]:
    """Every address of the explorer without its questions."""
    return [route.path for route in app.routes if isinstance(route, Route) and route.path != "/vega.js"]


@pytest.fixture(scope="module")
def pages(app: Starlette, client: TestClient, hostile_index: hostile.Hostile) -> dict[str, str]:
    """Address -> HTML of pages that are reached from the first one, and of each path asked for nothing."""
    con = queries.connect(str(hostile_index.index))
    sae = hostile_index.saes[0]
    [feature] = con.execute(
        "SELECT feature FROM features WHERE sae = ? ORDER BY n_tokens DESC LIMIT 1", [sae]
    ).fetchall()[0]
    documents = [key for (key,) in con.execute("SELECT document FROM documents ORDER BY row").fetchall()]
    ours = paths(app)
    seeds = ["/", *ours]
    for path in ours:
        if path.startswith(("/sae", "/feature", "/text")):
            seeds.append(f"{path}?{urlencode({'sae': sae, 'feature': feature, 'q': hostile.ACTS[0]})}")
        if path.startswith("/document"):
            asked = [{"document": key, "sae": sae, "feature": feature} for key in documents]
            seeds += [f"{path}?{urlencode(each)}" for each in asked]
        names = ("sae", "feature", "document", "q", "name", "sort")
        seeds += [f"{path}?{urlencode(dict.fromkeys(names, act))}" for act in hostile.ACTS[:6]]

    def get(address: str) -> str:
        answer = client.get(address)
        assert answer.status_code in (200, 400, 404, 503), address
        assert set(answer.headers) >= SECURITY
        return answer.text if "text/html" in answer.headers["content-type"] else ""

    return hostile.crawl(get, seeds, of_a_kind=40, most=400)


def is_fragment(html: str) -> bool:
    return not html.startswith("<!doctype html>")


def test_every_page_is_reached(app: Starlette, pages: dict[str, str]) -> None:
    assert {urlsplit(address).path for address in pages} >= set(paths(app))
    whole = [html for html in pages.values() if html and not is_fragment(html)]
    assert len(whole) >= 3


def test_no_element_or_attribute_comes_from_the_corpus(pages: dict[str, str]) -> None:
    found = {
        address: problems
        for address, html in pages.items()
        if html and (problems := hostile.Look(html).problems)
    }
    assert not found


def test_no_other_language_is_spoken(pages: dict[str, str]) -> None:
    for address, html in pages.items():
        assert "3703701" not in html, address


def test_no_character_steers_the_page(pages: dict[str, str]) -> None:
    """Fields keep what was typed into them; anything else is signs."""
    for address, html in pages.items():
        look = hostile.Look(html)
        found = re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", look.text)
        assert not found, (address, look.text[max(0, found.start() - 40) : found.end() + 40])


def test_headings_go_in_order_and_fields_have_labels(pages: dict[str, str]) -> None:
    for address, html in pages.items():
        if not html or is_fragment(html):
            continue
        look = hostile.Look(html)
        assert look.headings[0] == 1, address
        assert look.headings.count(1) == 1, address
        assert all(b - a <= 1 for a, b in zip(look.headings, look.headings[1:], strict=False)), address
        assert not look.unlabelled(), address
        assert look.title.endswith("Corpuscope"), address


def test_sae_names_are_seen_as_they_are(pages: dict[str, str], hostile_index: hostile.Hostile) -> None:
    text = hostile.Look(pages["/"]).text
    for sae in hostile_index.saes:
        assert hostile.shown(sae) in text or hostile.shown(sae).replace("\n", "") in text


def test_a_documents_text_is_seen_as_it_is(
    app: Starlette, pages: dict[str, str], hostile_index: hostile.Hostile
) -> None:
    if "/document" not in paths(app):
        pytest.skip("no page of documents")
    con = queries.connect(str(hostile_index.index))
    sae = hostile_index.saes[0]
    [feature] = con.execute(
        "SELECT feature FROM features WHERE sae = ? ORDER BY n_tokens DESC LIMIT 1", [sae]
    ).fetchall()[0]
    keys = con.execute("SELECT document, row FROM documents WHERE n_tokens BETWEEN 1 AND 90").fetchall()
    assert len(keys) > 15
    for key, row in keys:
        query = urlencode({"document": key, "sae": sae, "feature": feature})
        look = hostile.Look(pages[f"/document?{query}"])
        text = hostile.TEXTS[row]
        if len(text) > hostile.LONG:
            assert "A" * 2000 in look.tokens
            assert f"… {hostile.LONG - 2000:,} characters more" in look.tokens
            assert "A" * 2001 not in look.text
        else:
            assert hostile.shown(text) in look.tokens, row


def test_a_hostile_text_of_ones_own_is_seen_as_it_is(
    client: TestClient, hostile_index: hostile.Hostile
) -> None:
    for text in [*hostile.ACTS, *(text for text in hostile.TEXTS if 0 < len(text) < 2000)]:
        answer = client.get(f"/text?{urlencode({'q': text, 'sae': hostile_index.saes[0]})}")
        assert answer.status_code == 200
        look = hostile.Look(answer.text)
        assert not look.problems, text
        if text.strip():
            assert hostile.shown(text.replace("\r\n", "\n")) in look.tokens, text


# --- who may ask


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1", 200), ("localhost", 200), ("127.0.0.1:8642", 200), ("localhost:1", 200),
        ("127.0.0.1.evil.com", 400), ("evil.com", 400), ("localhost.evil.com:80", 400), ("", 400),
        ("evil.com:127.0.0.1", 400), ("127.0.0.1@evil.com", 400), ("0.0.0.0", 400), ("xlocalhost", 400),
    ],
)  # fmt: skip
def test_only_this_machines_names_are_answered(client: TestClient, host: str, code: int) -> None:
    for path in ("/", "/static/explorer.css", "/vega.js", "/nothing"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == (404 if path == "/nothing" and code == 200 else code), path
        if code != 200:
            assert "Corpuscope" not in answer.text


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_and_no_more(client: TestClient, site: str) -> None:
    for path in ("/", "/static/explorer.js", "/vega.js"):
        for mode in ("no-cors", "cors", "websocket", "same-origin", ""):
            answer = client.get(path, headers={"sec-fetch-site": site, "sec-fetch-mode": mode})
            assert answer.status_code == 403
            assert len(answer.content) < 100
    went = client.get("/", headers={"sec-fetch-site": site, "sec-fetch-mode": "navigate"})
    assert went.status_code == 200
    framed = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    assert "frame-ancestors 'none'" in client.get("/", headers=framed).headers["content-security-policy"]
    own = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert client.get("/", headers=own).status_code == 200


def test_every_answer_has_its_policy(client: TestClient, app: Starlette) -> None:
    addresses = [*paths(app), "/static/explorer.css", "/static/nothing", "/static", "/nothing", "/vega.js"]
    for address in addresses:
        headers = client.get(address, follow_redirects=False).headers
        assert set(headers) >= SECURITY, address
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert "access-control-allow-origin" not in headers
        assert "set-cookie" not in headers
    assert client.get("/").headers["cache-control"] == "no-store"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_understood(client: TestClient, app: Starlette, method: str) -> None:
    for path in (*paths(app), "/static/explorer.css", "/vega.js"):
        assert client.request(method, path).status_code == 405, path


# --- the command


@pytest.fixture(scope="module")
def served(few_index: Path) -> Iterator[tuple[psutil.Process, int]]:
    """`corpuscope explore` as a process of its own, and its port."""
    with started(few_index) as (process, port):
        yield psutil.Process(process.pid), port


class started:
    """The command at work; ended hard afterwards, if it is still there."""

    def __init__(self, index: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "explore", str(index), "--port", "0", *options],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def __enter__(self) -> tuple[subprocess.Popen[str], int]:
        assert self.process.stderr
        line = self.process.stderr.readline()
        port = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)\n", line)
        if not port:
            self.__exit__()
            raise AssertionError(line)
        return self.process, int(port[1])

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def ask(port: int, text: str) -> bytes:
    """What a socket says to a request as it is written; the server may close before all is sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as wire:
        wire.sendall(text.encode())
        said = b""
        while part := wire.recv(1 << 16):
            said += part
        return said


def get(port: int, path: str, host: str | None = "127.0.0.1") -> bytes:
    named = "" if host is None else f"Host: {host}\r\n"
    return ask(port, f"GET {path} HTTP/1.1\r\n{named}Connection: close\r\n\r\n")


def test_it_listens_on_this_machine_alone(served: tuple[psutil.Process, int]) -> None:
    process, port = served
    listening = [each for each in process.net_connections("all") if each.status == psutil.CONN_LISTEN]
    assert [(each.laddr.ip, each.laddr.port) for each in listening] == [("127.0.0.1", port)]


def test_it_answers_and_knows_its_host(served: tuple[psutil.Process, int]) -> None:
    port = served[1]
    page = get(port, "/", f"localhost:{port}")
    assert page.startswith(b"HTTP/1.1 200")
    assert b"tiny-att" in page
    assert b"server: uvicorn" not in page.lower()
    for host in (None, "", "evil.com", f"127.0.0.1.evil.com:{port}"):
        assert get(port, "/", host).startswith(b"HTTP/1.1 400"), host
    whole = ask(port, "GET http://evil.com/ HTTP/1.1\r\nHost: evil.com\r\nConnection: close\r\n\r\n")
    assert whole[9:12] == b"400"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py", "/static/../../../pyproject.toml", "/static/%2e%2e/app.py",
        "/static/..%2fapp.py", "/static/%2e%2e%2f%2e%2e%2f%2e%2e%2fpyproject.toml", "/static//etc/passwd",
        "/static/%2fetc%2fpasswd", "/static/..\\app.py", "/static/....//app.py", "/static/%00",
        "/static/explorer.css%00.html", "/static/", "/../../etc/passwd", "//etc/passwd",
        "/static/" + "../" * 30 + "etc/passwd", "/static/" + "a" * 5000,
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_folder(served: tuple[psutil.Process, int], path: str) -> None:
    said = get(served[1], path)
    assert said[9:12] in (b"404", b"400", b"405"), said[:200]
    assert b"root:" not in said
    assert b"starlette" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_well_and_nothing_stays(few_index: Path, number: int, tmp_path: Path) -> None:
    before = {str(file): file.stat().st_mtime_ns for file in few_index.rglob("*")}
    with started(few_index) as (process, port):
        assert get(port, "/").startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", port)):  # one who waits does not hold it up
            children = psutil.Process(process.pid).children(recursive=True)
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(timeout=60) == 0
            assert time.monotonic() - began < 20
        out, err = process.communicate()
        assert (out, err) == ("", "")
    assert not any(child.is_running() for child in children)
    assert {str(file): file.stat().st_mtime_ns for file in few_index.rglob("*")} == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def fails(*arguments: Any) -> tuple[int, str]:
    """Exit code and message of a command that ends at once."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "explore", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=dict(os.environ),
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_that_is_taken_is_said(served: tuple[psutil.Process, int], few_index: Path) -> None:
    port = served[1]
    code, said = fails(few_index, "--port", port)
    assert (code, said.count("\n")) == (2, 1)
    assert f"--port {port}: Address already in use; --port 0 takes a free one" in said


def test_an_index_that_is_not_there_is_said(tmp_path: Path) -> None:
    code, said = fails(tmp_path / "nothing", "--port", 0)
    assert (code, said.count("\n")) == (2, 1)
    assert "nothing" in said


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "vl_convert"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, few_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"pip install 'corpuscope\[explore\]'"):
        command.main([str(few_index), "--port", "0"], standalone_mode=False)
