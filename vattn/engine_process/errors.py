"""Failures of an engine that is a process of its own."""

from __future__ import annotations


class EngineDeadError(RuntimeError):
    """The engine process has ended, or does not answer; what it was computing is lost.

    Recoverable: unless ``restarting`` is False, another one is being started, and requests can be
    made again when :attr:`vattn.AsyncLLM.is_ready` is true.
    """

    def __init__(self, message: str, *, restarting: bool = True) -> None:
        super().__init__(message)
        self.restarting = restarting


class RequestRefused(ValueError):
    """A prompt or its parameters cannot be served; the message says why and what to do."""
