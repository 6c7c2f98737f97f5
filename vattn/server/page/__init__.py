"""The live page at ``/``: its files, and the route that serves them."""

from vattn.server.page.page import router

__all__ = ["router"]
