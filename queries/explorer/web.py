"""Between a page's function and HTTP: what it is asked, what it answers, how errors and times are told.

Invariant: a page's function knows nothing of HTTP, runs in a thread, on a connection of its own, under a time
limit; an error that a user can cause is one line on a page with a status of its own (400 wrong, 503 stopped
or failed), anything else is a 500 whose details go to the log alone.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import jinja2
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from queries import lookup
from queries.explorer import links, tokens
from queries.explorer.session import Session, Snapshot
from sae_runtime.errors import CorpuscopeError, DataError, InputError

_FOLDER = Path(__file__).parent
_LONGEST = 100  # characters of a wrong value that an error repeats
_log = logging.getLogger("corpuscope.explorer")


@dataclass(frozen=True)
class Ask:
    """What a page's function is given."""

    session: Session
    snapshot: Snapshot
    con: duckdb.DuckDBPyConnection
    query: QueryParams

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a statement of ours."""
        return lookup.ask(self.con, statement, values)

    def text(self, name: str, default: str = "") -> str:
        """A word of the address. Raises InputError for the one character that no SQL text can hold."""
        given = self.query.get(name, default).strip()
        if "\0" in given:
            raise InputError(f"{name}: the character NUL cannot be asked for")
        return given

    def integer(self, name: str, default: int | None = None, least: int = 0, most: int = 2**62) -> int:
        """A whole number of the address. Raises InputError where it is none, or must be given and is not."""
        given = self.text(name)
        if not given and default is not None:
            return default
        try:
            value = int(given)
        except ValueError:
            raise InputError(f"{name}: a whole number is wanted, not {given[:_LONGEST]!r}") from None
        if not least <= value <= most:
            raise InputError(f"{name}: {value:,} is not between {least:,} and {most:,}")
        return value

    def number(self, name: str) -> float | None:
        """A number of the address, if it is there. Raises InputError."""
        given = self.text(name)
        if not given:
            return None
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{name}: a number is wanted, not {given[:_LONGEST]!r}")
        return value

    def choice(self, name: str, among: Sequence[str], default: str) -> str:
        """One of some words. Raises InputError."""
        given = self.text(name) or default
        if given not in among:
            raise InputError(f"{name}: {given[:_LONGEST]!r} is none of {', '.join(among)}")
        return given

    def sae(self, name: str = "sae") -> str:
        """The id of an SAE that is named as everywhere. Raises InputError."""
        return lookup.resolve_sae(self.con, self.text(name))


Answer = dict[str, Any]
Page = Callable[[Ask], "Answer | Response"]


def page(path: str, function: Page, template: str = "") -> Route:
    """The route of a page. `template` is the function's values' as HTML; without it they are JSON.

    A function may answer with a Response instead, such as a download; `_status` among its values is the
    status of a page that tells of an error in its own place.
    """

    def endpoint(request: Request) -> Response:
        session: Session = request.app.state.session
        began = time.perf_counter()
        try:
            answer = _answer(session, request.query_params, function)
            took = time.perf_counter() - began
            if not isinstance(answer, Response):
                answer = _shown(request, template, answer, took, answer.pop("_status", 200))
        except CorpuscopeError as error:
            return _failed(request, error, as_html=bool(template))
        except Exception:
            _log.exception("%s", request.url.path)
            own = CorpuscopeError("an error of the explorer's own; its log says more")
            return _failed(request, own, as_html=bool(template), status=500)
        spent = time.perf_counter() - began
        answer.headers["Server-Timing"] = f"queries;dur={took * 1e3:.1f}, total;dur={spent * 1e3:.1f}"
        return answer

    return Route(path, endpoint, methods=["GET"])


def _answer(session: Session, query: QueryParams, function: Page) -> Answer | Response:
    snapshot = session.current()
    try:
        return _ask(session, snapshot, query, function)
    except DataError:  # files may have been replaced by a compaction and removed
        renewed = session.renew()
        if renewed.named == snapshot.named:
            raise
        return _ask(session, renewed, query, function)


def _ask(session: Session, snapshot: Snapshot, query: QueryParams, function: Page) -> Answer | Response:
    with snapshot.connection() as con, lookup.time_limit(con, session.seconds):
        return function(Ask(session, snapshot, con, query))


def _shown(request: Request, template: str, answer: Answer, took: float, status: int = 200) -> Response:
    if not template:
        return Response(to_json(answer), status, media_type="application/json")
    session: Session = request.app.state.session
    values = {"here": request.url.path.strip("/") or "index", "took": took, "session": session}
    return HTMLResponse(_templates.get_template(template).render(values | answer), status)


def _failed(request: Request, error: CorpuscopeError, as_html: bool, status: int | None = None) -> Response:
    if status is None:
        status = 400 if isinstance(error, InputError) else 503
    answer = {"error": str(error), "status": status, "title": "Not to be shown"}
    return _shown(request, "error.html" if as_html else "", answer, 0.0, status)


def not_found(request: Request) -> Response:
    """The page for an address that there is none at."""
    return _failed(
        request, InputError(f"{request.url.path[:_LONGEST]}: no such page"), as_html=True, status=404
    )


def to_json(value: Any) -> str:
    """JSON that may stand inside HTML, in a data block; NaN and infinities are null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def figure(value: float | int | None, digits: int = 4) -> str:
    """A number for people: grouped, four digits; an en dash where there is none."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if abs(value) < 10 ** min(digits, 4) - 0.5 else f"{value:,.0f}"


def share(value: float | None) -> str:
    """A share as a percentage that does not round to nothing: `12 %`, `0.031 %`."""
    if value is None or value != value:
        return "–"
    return f"{value * 100:.3g} %"


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,  # of every file, whatever its ending
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"figure": figure, "share": share, "visible": tokens.visible}
    made.globals |= {"to": links, "shaded": tokens.shaded, "data": _data}
    return made


def _data(value: Any) -> Any:
    """JSON for a data block of a template."""
    from markupsafe import Markup

    return Markup(to_json(value))


def template(name: str) -> jinja2.Template:
    """A template by its file's name."""
    return _templates.get_template(name)


_templates = _environment()
