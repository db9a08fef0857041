"""Render chats with an untrusted chat template.

`adapter_template.py` runs this as a script, with the template and chats as JSON on standard input and the texts as JSON
on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

NO_MEMORY = 13


def main(memory: int, seconds: int, paths: str) -> int:
    """Render the chats from standard input to standard output; return the exit status."""
    # The -I flag omits package folders outside the interpreter's own.
    sys.path.extend(path for path in paths.split(os.pathsep) if path not in sys.path)
    from transformers.utils import chat_template_utils  # noqa: F401  before the limits, which it would exceed

    from icmlora.base_models.examples.chat_template import ChatTemplate
    from icmlora.base_models.examples.chats import Chat
    from icmlora.formats.discovery.pickle_child import limit

    try:
        work = json.load(sys.stdin.buffer)
        limit(memory, seconds)
        chats = [Chat(**{**chat, "scored": tuple(chat["scored"])}) for chat in work["chats"]]
        found = ChatTemplate(work["templates"], work["special_tokens"]).render_all(chats)
        sys.stdout.write(json.dumps([_entry(one) for one in found]))
        sys.stdout.flush()
    except MemoryError:
        return NO_MEMORY
    return 0


def _entry(found: Any) -> dict[str, Any]:
    message = getattr(found, "message", None)
    if message is not None:
        return {"refused": message}
    return dict(vars(found))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
