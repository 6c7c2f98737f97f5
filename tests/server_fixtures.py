"""A real server for modules that name this one in `pytest_plugins`; see running_server.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.running_server import RunningServer, running_server

__all__ = ["RunningServer", "running_server", "server", "server_of_session"]


@pytest.fixture(scope="session")
def server_of_session() -> Iterator[RunningServer]:
    """The embedded model, with tools and prefix caching; for all tests that do not change it."""
    with running_server(enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        yield server


@pytest.fixture
def server(server_of_session: RunningServer) -> Iterator[RunningServer]:
    """The session's server; at the end of a test nothing of the test's may be left in it."""
    yield server_of_session
    server_of_session.wait_idle()
    server_of_session.state.admission.check()
