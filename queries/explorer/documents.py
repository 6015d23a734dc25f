"""Documents: a list to find them by, and one document with the features that are active on it."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
