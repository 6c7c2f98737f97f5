"""Settings of the server, checked where they enter; those of the engine are AsyncLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Names are vLLM's where it has the setting.

    Args:
        host: address to listen on.
        port: 0 for a free one.
        api_keys: any of them lets a client in, as ``Authorization: Bearer KEY``; none for everybody.
        admin_keys: for ``/admin/*``; none for ``api_keys``, and nobody if there are none.
        served_model_names: by which clients may name the model; responses have the first.
        chat_template: the text of a Jinja template instead of the tokenizer's.
        enable_auto_tool_choice: ``tool_choice: "auto"`` is served.
        tool_call_parser: ``"hermes"`` or ``"llama3_json"``.
        max_queued_requests: prompts that may wait beside those that run; more get 429.
        max_queued_tokens: tokens (prompt and most new ones) of all unfinished prompts; more get
            429. None for no limit.
        max_body_bytes: of a request; larger ones get 413.
        body_timeout_s: for a request's head and body to arrive; slower clients get 408.
        request_timeout_s: of a request in all; then it ends with what it has. None for no limit.
        drain_timeout_s: after SIGTERM, for what runs to end.
        allowed_origins: for CORS; none, the default, means that CORS is off.
        log_format: ``"text"`` or ``"json"``.
        log_level: ``"debug"`` to ``"error"``.
        max_logprobs: most that ``logprobs`` and ``top_logprobs`` may ask for.
        ssl_keyfile: with ``ssl_certfile``: serve HTTPS.
        ssl_certfile: see there.
        page: serve the live page at ``/``.
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
