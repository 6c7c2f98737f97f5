"""A chat as the tokens of a prompt, by the model's chat template."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from vattn.server.errors import ApiError
from vattn.server.openai.chat_messages import Message, for_template, text_of
from vattn.server.openai.sampling import encode
from vattn.server.state import ServerState
from vattn.texts import beside

_MESSAGE_CHARS = 64  # what a message takes beside its text
_OWN = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}


async def chat_prompt(
    state: ServerState,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a chat.

    Args:
        state: has the tokenizer, and a template if there is one instead of the tokenizer's.
        messages: as the client sent them.
        tools: as the client sent them.
        add_generation_prompt: end with what begins an answer.
        continue_final_message: leave the last message open, to be continued.
        add_special_tokens: add the tokenizer's own; templates write theirs themselves.
        chat_template_kwargs: further variables of the template.

    Raises:
        ApiError: 400; there is no template, or it refuses the messages.
    """
    if continue_final_message and add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message=true needs add_generation_prompt=false",
            param="continue_final_message",
        )
    given = dict(chat_template_kwargs or {})
    if taken := sorted(_OWN & given.keys()):
        raise ApiError(
            400,
            f"chat_template_kwargs has {', '.join(taken)}, which are not the client's to give",
            param="chat_template_kwargs",
        )
    listed = [dict(tool) for tool in tools] if tools else None
    template = _template(state, listed)
    chat = for_template(messages, developer_role="developer" in template)

    def render() -> str:
        return _render(
            state.llm.tokenizer,
            chat,
            tools=listed,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **given,
        )

    chars = sum(len(text_of(message.content)) + _MESSAGE_CHARS for message in messages)
    # Nobody has counted the characters of tools and variables.
    text = await beside(sys.maxsize if listed or given else chars, render)
    ids = await encode(state.llm, text, add_special_tokens=add_special_tokens)
    if not ids:
        raise ApiError(400, "the messages come to no tokens; say something", param="messages")
    return ids


def _template(state: ServerState, tools: list[dict[str, Any]] | None) -> str:
    if state.settings.chat_template is not None:
        return state.settings.chat_template
    tokenizer = state.llm.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(
            400,
            "this model's tokenizer has no chat template; start the server with --chat-template, "
            "or use /v1/completions",
            param="messages",
        )
    template: str = tokenizer.get_chat_template(None, tools)
    return template


def _render(tokenizer: Any, chat: list[dict[str, Any]], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    # What a template does with messages that it was not made for is any error of Python.
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ApiError(
            400, f"the chat template does not take these messages: {error}", param="messages"
        ) from error
    return text
