"""A passage of one's own: the model runs on it, and what fires is held against the index."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
