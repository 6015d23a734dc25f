"""The page of an SAE: its features as a map, as a table, by density."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
