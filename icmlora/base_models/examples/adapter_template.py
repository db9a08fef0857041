"""Render an adapter's own chat template in a child process with limits. Never imports torch.

A template is a program. transformers' sandbox keeps it away from files and Python internals, but does not stop it from
running forever or exhausting memory. The base model's template is as trusted as the base model. A template from an
adapter's folder runs in its own process (`template_child.py`), once for all chats of a file.
"""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from icmlora.base_models.examples import template_child
from icmlora.base_models.examples.chat_template import ChatTemplate, Rendered, Templates
from icmlora.base_models.examples.chats import Chat
from icmlora.errors import DataError
from icmlora.io.child import run_child

JINJA_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
_HINT = "remove the chat template from the adapter's folder and ingest it again to use the base model's template"


@dataclass(frozen=True)
class TemplateLimits:
    """Limits for rendering all chats of a file, on top of what the process itself needs."""

    memory: int = 256 << 20
    memory_per_byte: int = 16
    seconds: int = 20
    seconds_per_megabyte: int = 20
    wall_seconds: int = 120  # extra, for slow process startup


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
    template: ChatTemplate, chats: Sequence[Chat], limits: TemplateLimits = TemplateLimits()
) -> list[Rendered | DataError]:
    """Render chats with an untrusted template; return the error in place of a chat that cannot be rendered.

    Raises:
        DataError: The template needs too much memory or time.
    """
    work = {"templates": template.templates, "special_tokens": template.special_tokens, "chats": [*map(asdict, chats)]}
    data = json.dumps(work, default=str).encode()
    memory = limits.memory + limits.memory_per_byte * len(data)
    seconds = limits.seconds + limits.seconds_per_megabyte * len(data) // 2**20
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(data)
        source.flush()
        status = run_child(
            template_child.__file__,
            [str(memory), str(seconds)],
            source.fileno(),
            target.fileno(),
            wall_seconds=limits.wall_seconds + 2 * seconds,
        )
        if status != 0:
            raise DataError(_fact(status, memory, seconds), hint=_HINT)
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


def _fact(status: int | None, memory: int, seconds: int) -> str:
    if status in (None, -signal.SIGXCPU):
        return f"the adapter's own chat template takes more than {seconds} s"
    if status in (template_child.NO_MEMORY, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGXFSZ):
        return f"the adapter's own chat template takes more than {memory >> 20} MiB"
    return f"the process that renders the adapter's own chat template ended with status {status}"
