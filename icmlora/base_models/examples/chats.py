"""Convert the common chat formats to one: OpenAI's messages. Never imports torch.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}     OpenAI, TRL
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}         ShareGPT
    {"instruction": "...", "input": "...", "output": "..."}                                        Alpaca
    {"prompt": [messages], "completion": [messages]}                                               TRL

The chat template determines how a model sees a chat; see `chat_template.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icmlora.errors import DataError

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
_EXTRA_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)


@dataclass(frozen=True)
class Chat:
    """One conversation."""

    messages: tuple[Message, ...]  # role and content of each; content is always text
    # Indices of the messages that count towards the loss: the messages that the adapter learned to write.
    scored: tuple[int, ...]
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of the available tools
    # Prompt, completion and optional context for a base model without a chat template; None if the format has no plain
    # form.
    plain: tuple[str, ...] | None = None
    context: int = 0  # number of leading messages that precede the chat itself; see `context.py`


def chat_of(row: Mapping[str, Any]) -> Chat | None:
    """Return the chat in a row, or None if there is none.

    Raises:
        DataError: The chat is unusable; the message is a fact about the row, such as "has no assistant turn".
    """
    match row:
        case {"messages": [_, *_] as turns} | {"conversations": [_, *_] as turns}:
            return _chat(row, [], turns)
        case {"prompt": list() | str() as prompt, "completion": list() | str() as answer}:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answers = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            return _chat(row, asked, answers)
        case {"instruction": str(instruction), "output": str(output)}:
            given = row.get("input")
            return _alpaca(row, instruction, given if isinstance(given, str) else "", output)
    return None


def _chat(row: Mapping[str, Any], prompt: Sequence[Any], answer: Sequence[Any]) -> Chat:
    turns = [*prompt, *answer]
    messages = [message_of(turn) for turn in turns]
    if messages and isinstance(system := row.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    first = len(messages) - len(answer)
    scored = []
    for number, turn in enumerate(answer, first):
        message = messages[number]
        is_answer = message["role"] == "assistant" and (message["content"].strip() or message.get("tool_calls"))
        if is_answer and turn.get("weight") != 0 and turn.get("train") is not False:
            scored.append(number)
    if not scored:
        raise DataError("has no assistant turn")
    try:
        json.dumps(messages, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("contains a lone surrogate, which is not valid text") from None
    except (TypeError, ValueError, RecursionError) as error:  # dates in Parquet
        raise DataError(f"has a message that is not JSON: {error}") from None
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = None
    # Anything but a list of objects is ignored, because templates cannot use it.
    is_usable = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return Chat(tuple(messages), tuple(scored), tuple(tools) if is_usable else ())  # type: ignore[arg-type]


def message_of(turn: Any) -> Message:
    """Convert a turn to an OpenAI message; raise `DataError` if it is not a message."""
    if not isinstance(turn, dict):
        raise DataError("has a message that is not an object")
    role = turn.get("role") or turn.get("from")
    content = turn["content"] if "content" in turn else turn.get("value")
    if not isinstance(role, str):
        raise DataError("has a message without a role")
    message: Message = {"role": _ROLES.get(role, role), "content": _content(content)}
    message |= {name: turn[name] for name in _EXTRA_FIELDS if turn.get(name) is not None}
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_tool_call(call) for call in calls]
    return message


def _content(content: Any) -> str:
    match content:
        case str():
            return content
        case None:  # a turn that only calls tools
            return ""
        case list():
            return "".join(map(_part, content))
    raise DataError("has a message with content that is not text")


def _part(part: Any) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise DataError(f"has a message with a part that is not text: {kind[:40]!r}")
    raise DataError("has a message with content that is not text")


def _tool_call(call: Any) -> Any:
    """Parse a call's arguments: OpenAI stores them as JSON text, but chat templates expect an object."""
    match call:
        case {"function": {"arguments": str(text)} as function}:
            try:
                arguments = json.loads(text)
            except (ValueError, RecursionError):
                return call
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _alpaca(row: Mapping[str, Any], instruction: str, given: str, output: str) -> Chat:
    history = row.get("history")
    turns: list[Message] = []
    for pair in history if isinstance(history, list) else ():
        match pair:
            case [str(asked), str(answered)]:
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked = f"{instruction}\n{given}" if given.strip() else instruction
    turns.append({"role": "user", "content": asked})
    chat = _chat(row, turns, [{"role": "assistant", "content": output}])
    more = ", paired with an input that provides further context" if given.strip() else ""
    shown = f"### Input:\n{given}\n\n" if given.strip() else ""
    prompt = _ALPACA.format(more=more, instruction=instruction, given=shown)
    # The plain form has no place for a system prompt or earlier turns.
    return chat if len(chat.messages) > 2 else Chat(chat.messages, chat.scored, plain=(prompt, output))
