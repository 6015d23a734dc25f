"""The page of a feature: what it is active on, how often, and what is like it."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
