"""Render chats with an untrusted chat template in a sandbox: JSON to JSON."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

from transformers.utils import chat_template_utils  # noqa: F401  before the limits, which it would exceed

from icmlora.base_models.examples.chat_template import ChatTemplate
from icmlora.base_models.examples.chats import Chat
from icmlora.errors import DataError


def work(order: dict[str, Any], source: BinaryIO, target: BinaryIO) -> int:
    """Render the chats; an entry of the output is a text with its positions, or the reason of a refusal."""
    given = json.load(source)
    chats = [Chat(**{**chat, "scored": tuple(chat["scored"])}) for chat in given["chats"]]
    found = ChatTemplate(given["templates"], given["special_tokens"]).render_all(chats)
    entries = [{"refused": one.message} if isinstance(one, DataError) else vars(one) for one in found]
    target.write(json.dumps(entries).encode())
    return 0
