"""Settings of the server, checked where they enter; those of the engine are AsyncLLM's."""

from __future__ import annotations

import math
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from vattn.logs import FORMATS, LEVELS

_CHOICES = {
    "log_level": LEVELS,
    "log_format": FORMATS,
    "tool_call_parser": ("hermes", "llama3_json"),
}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Names are vLLM's where it has the setting.

    Args:
        host: address to listen on.
        port: 0 for a free one.
        api_keys: any of them lets a client in, as ``Authorization: Bearer KEY``; none: all may.
        admin_keys: for ``/admin/*``; none for ``api_keys``, and nobody if there are none.
        served_model_names: by which clients may name the model; responses have the first.
        chat_template: the text of a Jinja template instead of the tokenizer's.
        enable_auto_tool_choice: ``tool_choice: "auto"`` is served.
        tool_call_parser: ``"hermes"`` or ``"llama3_json"``.
        max_queued_requests: samples (``n`` of each prompt) that may wait beside those that run;
            more get 429.
        max_queued_tokens: tokens (prompts and most new ones) of all unfinished samples; more get
            429. None for no limit.
        max_body_bytes: of a request; larger ones get 413.
        body_timeout_s: for a request's head and body to arrive; slower clients get 408.
        request_timeout_s: from a request's arrival, with tokenizing, compiling and waiting; then it
            ends with what it has. None for no limit.
        drain_timeout_s: after SIGTERM, for what runs to end.
        allowed_origins: for CORS; none, the default, means that CORS is off.
        log_format: ``"text"`` or ``"json"``.
        log_level: ``"debug"`` to ``"error"``.
        max_logprobs: most that ``logprobs`` and ``top_logprobs`` may ask for; -1 for all.
        ssl_keyfile: with ``ssl_certfile``: serve HTTPS.
        ssl_certfile: see there.
        page: serve the live page at ``/``.

    Raises:
        ValueError: a value out of range, or two that do not go together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    served_model_names: tuple[str, ...] = ("embedded",)
    chat_template: str | None = None
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    max_queued_requests: int = 2048
    max_queued_tokens: int | None = None
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    drain_timeout_s: float = 30.0
    allowed_origins: tuple[str, ...] = ()
    log_format: str = "text"
    log_level: str = "info"
    max_logprobs: int = 20
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    page: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port} must be 0 to 65535")
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError(f"served_model_names={self.served_model_names!r} must have names")
        for kind in ("api_keys", "admin_keys"):
            if not all(re.fullmatch(r"[!-~]+", key) for key in getattr(self, kind)):
                raise ValueError(
                    f"{kind} has a key that no header can carry, or one with a space; a key is of "
                    "printable ASCII, at least one character"
                )
        self._check_limits()
        self._check_choices()

    def _check_limits(self) -> None:
        if self.max_queued_requests < 0:
            raise ValueError(f"max_queued_requests={self.max_queued_requests} must be 0 or more")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs={self.max_logprobs} must be -1, for all, or more")
        for name in ("max_queued_tokens", "max_body_bytes", "body_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise ValueError(f"drain_timeout_s={self.drain_timeout_s} must be 0 or more")

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            parsers = ", ".join(_CHOICES["tool_call_parser"])
            raise ValueError(f"enable_auto_tool_choice needs a tool_call_parser: {parsers}")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("give both ssl_keyfile and ssl_certfile, or neither")
        self._check_certificate()
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"allowed_origins={origin!r} must be * or as a browser sends it, such as "
                    "https://example.org"
                )

    def _check_certificate(self) -> None:
        """Now, and not when the model has been loaded."""
        if self.ssl_certfile is None:
            return
        name = "ssl_certfile"
        try:
            Path(self.ssl_certfile).read_bytes()
            name = "ssl_keyfile"
            Path(str(self.ssl_keyfile)).read_bytes()
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except OSError as error:
            text = f"{name}={getattr(self, name)} is no PEM file for HTTPS: {error}"
            raise ValueError(text) from error
