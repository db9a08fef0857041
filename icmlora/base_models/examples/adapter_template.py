"""Render an adapter's own chat template in a sandbox. Never imports torch.

A template is a program. transformers' sandbox keeps it away from files and Python internals, but does not stop it from
running forever or exhausting memory. The base model's template is as trusted as the base model. A template from an
adapter's folder runs in a sandbox (`template_child.py`), once for all chats of a file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from icmlora.base_models.examples.chat_template import ChatTemplate, Rendered, Templates
from icmlora.base_models.examples.chats import Chat
from icmlora.errors import DataError
from icmlora.io.sandbox import NO_MEMORY, TOO_SLOW, Sandbox, SandboxLimits

JINJA_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
_HINT = "remove the chat template from the adapter's folder and ingest it again to use the base model's template"


LIMITS = SandboxLimits(memory_per_byte=16, seconds=20, seconds_per_byte=20 / 2**20)
"""Limits for rendering all chats of a file."""


def template_of(files: Mapping[str, bytes]) -> Templates | None:
    """Return the chat template among an adapter's files, from where transformers looks for it."""
    if JINJA_NAME in files:
        return files[JINJA_NAME].decode("utf-8", "replace")
    try:
        config = json.loads(files.get(CONFIG_NAME, b"null"))
    except (ValueError, RecursionError):
        return None
    match config:
        case {"chat_template": str(text)}:
            return text
        case {"chat_template": [*several]}:
            return {one["name"]: one["template"] for one in several if _is_named(one)} or None
    return None


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def render_in_child(
    template: ChatTemplate, chats: Sequence[Chat], limits: SandboxLimits = LIMITS
) -> list[Rendered | DataError]:
    """Render chats with an untrusted template; return the error in place of a chat that cannot be rendered.

    Raises:
        DataError: The template needs too much memory or time.
    """
    work = {"templates": template.templates, "special_tokens": template.special_tokens, "chats": [*map(asdict, chats)]}
    data = json.dumps(work, default=str).encode()
    with (
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as target,
        Sandbox("icmlora.base_models.examples.template_child") as sandbox,
    ):
        source.write(data)
        source.flush()
        status = sandbox.run({}, source.fileno(), target.fileno(), len(data), limits)
        memory, seconds = limits.for_size(len(data))
        if status == TOO_SLOW:
            raise DataError(f"the adapter's own chat template takes more than {seconds} s", hint=_HINT)
        if status == NO_MEMORY:
            raise DataError(f"the adapter's own chat template takes more than {memory >> 20} MiB", hint=_HINT)
        if status != 0:
            fact = f"the process that renders the adapter's own chat template ended with status {status}"
            raise DataError(fact, hint=_HINT)
        target.seek(0)
        return [_result(entry) for entry in json.load(target)]


def _result(entry: dict[str, object]) -> Rendered | DataError:
    match entry:
        case {
            "text": str(text),
            "scored": list(spans),
            "start": int(start),
            "stop": int(stop),
            "context": int(context),
        }:
            return Rendered(text, tuple((first, end) for first, end in spans), start, stop, context)
    return DataError(str(entry["refused"]))
