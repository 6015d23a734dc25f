"""One read-only statement, and the recipes."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
