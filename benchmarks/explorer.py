"""What the explorer's pages cost on a large index of several SAEs: the server's time, first visit and again.

    python benchmarks/explorer.py [--rows 1e8] [--saes 16] [--documents 1e5] [--uncompacted] [--index URI]

The index is `synthetic.py`'s, made once and kept in out/bench/explorer; --index asks another one. The
application runs in this process and is asked over ASGI, so that neither a socket nor a browser is timed;
times are the pages' own (`Server-Timing`). Invariant: no page is named here. They are found by following
links from the first one, from pages about features at the 10th, 50th and 99th percentile of density and about
documents of middle and full length, and every path that the application has is asked once without a question.

*First* is a page as the first one after the index was opened (files in the file cache), *again* the median
of later visits to it; both the worst of the addresses of a path. A page that answers a person's own question
(SQL, a recipe, a comparison, a text, a count of what fires with a feature) has no bar but for its form, as it
takes what the question takes.
"""

from __future__ import annotations

import html
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

# This file has the name of a module, so the repository comes first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import click

Found = dict[str, Any]
OUT = Path("out/bench/explorer").resolve()
BAR_MS = 200.0
OWN = ("/sql", "/recipe", "/compare", "/text", "/feature/cofiring")  # whose questions are a person's own
LEVELS = (0.1, 0.5, 0.99)  # of density among living features


def seeds(index: str) -> list[Found]:
    """Questions about an index that pages may understand."""
    import queries

    con = queries.connect(index)
    try:
        [sae, *_] = [
            name for (name,) in con.execute("SELECT sae FROM _declared_saes ORDER BY sae").fetchall()
        ]
        alive = con.execute(
            "SELECT feature FROM features WHERE sae = ? AND n_tokens > 0 ORDER BY density, feature", [sae]
        ).fetchall()
        features = [alive[min(len(alive) - 1, int(len(alive) * level))][0] for level in LEVELS]
        by_length = con.execute("SELECT document FROM documents ORDER BY n_tokens, document").fetchall()
        documents = [by_length[int((len(by_length) - 1) * level)][0] for level in (0.5, 1.0)]
    finally:
        con.close()
    asked = [{"sae": sae, "feature": feature} for feature in features]
    return [{"sae": sae}, *asked, *({"document": document, "sae": sae} for document in documents),
            {"document": documents[0], "sae": sae, "feature": features[-1]}]  # fmt: skip


class Client:
    """The application in this process, opened anew when told."""

    def __init__(self, index: str) -> None:
        self.index = index
        self.open()

    def open(self) -> float:
        """Forget everything; seconds to open the index."""
        from starlette.testclient import TestClient

        from pipelines.status import status
        from queries.explorer.app import application
        from queries.explorer.session import Outside, open_session

        began = time.perf_counter()
        session = open_session(self.index.split(","), Outside(status))
        took = time.perf_counter() - began
        app = application(session)
        self.paths = [r.path for r in app.routes if getattr(r, "methods", None) and r.path != "/vega.js"]  # type: ignore[attr-defined]
        self.http = TestClient(app, base_url="http://localhost")
        return took

    def get(self, address: str) -> tuple[Any, dict[str, float]]:
        """An answer and milliseconds by the page's own account."""
        answer = self.http.get(address)
        said = answer.headers.get("server-timing", "")
        times = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", said)}
        return answer, times


def addresses(client: Client, questions: list[Found], of_a_kind: int) -> dict[str, list[str]]:
    """Addresses that answer, by path: some of each, at most one of a path with the same parameters more."""
    waiting = ["/", *client.paths]
    for path in client.paths:
        waiting += [f"{path}?{urlencode(question)}" for question in questions if _suits(path, question)]
    found: dict[str, list[str]] = {}
    while waiting:
        address = waiting.pop(0).split("#")[0]
        own = found.setdefault(urlsplit(address).path, [])
        shape = sorted(parse_qs(urlsplit(address).query))
        alike = sum(sorted(parse_qs(urlsplit(each).query)) == shape for each in own)
        if address in own or alike >= 3 or len(own) >= of_a_kind:
            continue
        answer, times = client.get(address)
        if answer.status_code != 200 or not times:
            continue
        own.append(address)
        if answer.headers["content-type"].startswith("text/html"):
            links = [
                html.unescape(link) for link in re.findall(r'(?:href|data-from)="(/[^"]*)"', answer.text)
            ]
            waiting += [link for link in links if "download=" not in link and not link.startswith("/static")]
    return {path: own for path, own in found.items() if own}


def _suits(path: str, question: Found) -> bool:
    """Whether a page of this path may be about that."""
    kinds = [kind for kind in ("document", "feature", "sae") if path.startswith(f"/{kind}")]
    return bool(kinds) and kinds[0] in question and (kinds[0] != "sae" or len(question) == 1)


def measure(index: str, repeat: int, of_a_kind: int) -> Found:
    """Times of every path's addresses."""
    client = Client(index)
    found: Found = {"open_ms": round(1000 * client.open(), 1), "pages": []}
    for path, own in sorted(addresses(client, seeds(index), of_a_kind).items()):
        for address in own:
            click.echo(f"asking {address[:110]}", err=True)
            client.open()
            answer, first = client.get(address)
            again = [client.get(address)[1] for _ in range(repeat)]
            found["pages"].append(
                {
                    "path": path,
                    "address": address,
                    "first_ms": first["total"],
                    "again_ms": statistics.median(each["total"] for each in again),
                    "queries_ms": statistics.median(each["queries"] for each in again),
                    "kilobytes": round(len(answer.content) / 1000, 1),
                    "bar": "" if path in OWN and "?" in address else BAR_MS,
                }
            )
    return found


def misses(found: Found) -> list[str]:
    """Which pages are above the bar, a line each."""
    return [
        f"{page['address']}: {what} {page[key]:,.0f} ms, at most {page['bar']:,.0f} is wanted"
        for page in found["pages"]
        for what, key in (("first", "first_ms"), ("again", "again_ms"))
        if page["bar"] and page[key] > page["bar"]
    ]


def table(found: Found) -> str:
    """For people: the worst of each path."""
    lines = [
        f"{found['hardware']['date']}  {found['hardware']['processor']}, {os.cpu_count()} cores, load "
        f"{found['load']:.1f}; {found['rows']:,} rows, {found['saes']} SAEs, "
        f"{found['documents']:,} documents; opening {found['open_ms']:,.0f} ms",
        "",
        ("{:30}" + "{:>11}" * 5).format("worst of", "addresses", "first", "again", "queries", "kB"),
    ]
    kinds: dict[str, list[Found]] = {}
    for page in found["pages"]:
        kinds.setdefault(page["path"] + ("" if page["bar"] else " (own)"), []).append(page)
    for kind, pages in kinds.items():
        worst = [
            max(page[key] for page in pages) for key in ("first_ms", "again_ms", "queries_ms", "kilobytes")
        ]
        lines.append(f"{kind:30}{len(pages):>11}" + "".join(f"{value:>11,.1f}" for value in worst))
    return "\n".join([*lines, *(f"MISSED {line}" for line in misses(found))])


@click.command(context_settings={"show_default": True})
@click.option("--rows", default=1e8, help="Activations, of all SAEs together.")
@click.option("--saes", default=16)
@click.option("--width", default=16384, help="Features of each SAE.")
@click.option("--documents", default=1e5)
@click.option("--uncompacted", is_flag=True, help="As its units' files, as many as a scan makes.")
@click.option("--units", default=0, help="0: as many as a scan on a CPU makes.")
@click.option("--index", default=None, help="Ask this index, or several, instead.")
@click.option("--repeat", default=5, help="Visits after the first one.")
@click.option("--of-a-kind", default=6, help="Addresses of a path, at most.")
@click.option("--folder", default=str(OUT), help="Where indexes are kept.")
@click.option("--processes", default=2, help="That make an index.")
@click.option("--make", "only_make", is_flag=True, help="Make the index and ask nothing.")
@click.option("--out", default=None, help="A file for the JSON.")
def main(
    rows: float,
    saes: int,
    width: int,
    documents: float,
    uncompacted: bool,
    units: int,
    index: str | None,
    repeat: int,
    of_a_kind: int,
    folder: str,
    processes: int,
    only_make: bool,
    out: str | None,
) -> None:
    """Time every page of the explorer."""
    import compare
    import synthetic

    import queries

    if index is None:
        l0 = rows / saes / documents / synthetic.DOCUMENT
        shape = synthetic.Shape.of(rows / saes, width, units, l0, saes)
        index = str(synthetic.make(Path(folder), shape, processes, compacted=not uncompacted))
    if only_make:
        click.echo(index)
        return
    found: Found = {"hardware": compare.here(os.cpu_count() or 1), "load": os.getloadavg()[0]}
    con = queries.connect(*index.split(","))
    [(n_rows, n_saes)] = con.execute(
        "SELECT sum(n_tokens)::BIGINT, count(DISTINCT sae) FROM _feature_counts"
    ).fetchall()
    [(n_documents,)] = con.execute("SELECT count(*) FROM documents").fetchall()
    con.close()
    found |= {"rows": n_rows, "saes": n_saes, "documents": n_documents}
    found |= measure(index, repeat, of_a_kind)
    click.echo(table(found))
    text = json.dumps(found, indent=1)
    if out is None:
        click.echo(text)
    else:
        Path(out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
