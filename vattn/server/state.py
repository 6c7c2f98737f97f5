"""What the routes of one server share; in ``app.state.vattn``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from fastapi import Request

from vattn.async_llm import AsyncLLM
from vattn.server.settings import ServerSettings

if TYPE_CHECKING:
    from vattn.server.admission import Admission
    from vattn.server.metrics import ServerMetrics


@dataclass
class ServerState:
    """One engine, and who may ask what of it.

    Args:
        llm: the engine.
        settings: of the server.
        admission: who is let in.
        metrics: what is told to Prometheus.
        created: Unix time, for ``/v1/models``.
        draining: no new requests are taken.
    """

    llm: AsyncLLM
    settings: ServerSettings
    admission: Admission
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token of the tokenizer, as it writes them."""
        return max(map(len, self.llm.tokenizer.get_vocab()))


def state_of(request: Request) -> ServerState:
    """The state of the server that serves a request."""
    state: ServerState = request.app.state.vattn
    return state
