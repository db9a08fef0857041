"""Insert a task's context into requests, on routes for text and chats.

/v1/completions               prompt                 the context's text followed by the prompt
/v1/chat/completions          messages               the context's messages, after a system message
/v1/messages, .../count_tokens  system, messages     the same, for clients of Anthropic's API
/v1/responses                 instructions, input    the same, unless it continues an earlier response
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from icmlora.base_models.examples.chats import Message
from icmlora.base_models.examples.context import SEPARATOR, TaskContext
from icmlora.serving.gateway.engines import Body
from icmlora.serving.gateway.problems import HttpProblem

HEADER = b"icm-context"
"""In a request: whether to insert its task's context. In a response: the result."""
ON, OFF, NONE, TOO_LONG, UNFIT = "on", "off", "none", "too-long", "unfit"
_SPOKEN = frozenset({"system", "user", "assistant"})  # roles common to all APIs


def is_wanted(header: bytes, *, default: bool) -> bool:
    """Return whether a request's header asks for the context. Raise `HttpProblem` for an invalid value."""
    word = header.decode("latin-1").strip().lower()
    if word in ("", ON, OFF):
        return default if not word else word == ON
    raise HttpProblem(400, f"The header icm-context must be {ON!r} or {OFF!r}.", "invalid_header")


def with_context(
    route: str, fields: Body, context: TaskContext | None, *, is_too_long: bool = False
) -> tuple[Body, str]:
    """Return a request with its task's context inserted, or unchanged; also return the value of the response header."""
    if context is None:
        return fields, NONE
    if is_too_long:
        return fields, TOO_LONG
    insert = _ROUTES.get(route)
    changed = None if insert is None else insert(fields, context)
    return (fields, UNFIT) if changed is None else (changed, ON)


def _completion(fields: Body, context: TaskContext) -> Body | None:
    match fields.get("prompt"):
        case str(prompt) if context.text:
            return fields | {"prompt": context.text + prompt}
        case [*prompts] if context.text and prompts and all(isinstance(prompt, str) for prompt in prompts):
            return fields | {"prompt": [context.text + prompt for prompt in prompts]}
    return None  # token ids


def _chat(fields: Body, context: TaskContext) -> Body | None:
    messages = _messages(fields)
    if messages is None:
        return None
    return fields | {"messages": list(map(_with_json_arguments, context.before_messages(messages)))}


def _anthropic(fields: Body, context: TaskContext) -> Body | None:
    """Insert the context, with the system prompt in its separate field as this API requires."""
    messages, system = _messages(fields), fields.get("system")
    if messages is None:
        return None
    led = [{"role": "system", "content": system}] if system else []
    first, *rest = context.before_messages([*led, *messages])
    turns = rest if first["role"] == "system" else [first, *rest]
    if any(turn.get("role") not in _SPOKEN for turn in turns):
        return None
    return fields | {"messages": turns} | ({"system": first["content"]} if first["role"] == "system" else {})


def _response(fields: Body, context: TaskContext) -> Body | None:
    asked, instructions = fields.get("input"), fields.get("instructions")
    if fields.get("previous_response_id") or not isinstance(asked, str | list):
        return None
    items = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not context.messages and isinstance(instructions, str) and instructions:
        return fields | {"instructions": f"{context.text.rstrip()}{SEPARATOR}{instructions}"}
    own = context.messages
    if instructions and own and own[0]["role"] == "system":
        own = own[1:]
    if any(turn["role"] not in _SPOKEN or "tool_calls" in turn for turn in own):
        return None
    return fields | {"input": TaskContext(context.text, own).before_messages(items)}


_ROUTES: Mapping[str, Callable[[Body, TaskContext], Body | None]] = {
    "/v1/completions": _completion,
    "/v1/chat/completions": _chat,
    "/v1/messages": _anthropic,
    "/v1/messages/count_tokens": _anthropic,
    "/v1/responses": _response,
}


def _messages(fields: Body) -> list[Message] | None:
    value = fields.get("messages")
    is_chat = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    return value if is_chat else None


def _with_json_arguments(message: Message) -> Message:
    """Convert the arguments of tool calls to JSON text, as this API requires."""

    def convert(call: Any) -> Any:
        match call:
            case {"function": {"arguments": dict(arguments)} as function}:
                return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        return call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": list(map(convert, calls))} if isinstance(calls, list) else message
