"""Two sets of documents: the features whose frequency differs, as `diff` tests them."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
