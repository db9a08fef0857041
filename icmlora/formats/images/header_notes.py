"""Extract a trainer's notes from the header of a single-file adapter, for display.

Header text is untrusted: it is escaped and truncated before it is shown.

Sources: kohya-ss/sd-scripts (`ss_*`), the modelspec standard (`modelspec.*`), ostris/ai-toolkit (`training_info`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from registry.names import escape

_MAX_TAGS = 8
_MAX_TEXT = 200
_MAX_JSON = 16 << 20
_UNSET = frozenset({"", "None", "null", "none"})


def header_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the most useful notes by name: title, trigger words, tags, and training settings."""
    notes = {
        "title": _first(metadata, "modelspec.title", "ss_output_name", "name"),
        "trained on": _first(metadata, "ss_sd_model_name", "modelspec.implementation_base_model"),
        "trigger words": _first(metadata, "modelspec.trigger_phrase", "ss_trigger_words", "trigger_word"),
        "frequent tags": ", ".join(f"{tag} {count}" for tag, count in frequent_tags(metadata).items()),
        "training": ", ".join(_training(metadata)),
        "comment": _first(metadata, "ss_training_comment", "modelspec.description"),
    }
    return {name: escape(" ".join(text.split()), _MAX_TEXT) for name, text in notes.items() if text}


def trigger_words(metadata: Mapping[str, str]) -> str | None:
    """Return the trigger words for prompts, or the most frequent tags if there are none."""
    noted = _first(metadata, "modelspec.trigger_phrase", "ss_trigger_words", "trigger_word")
    return noted or ", ".join(frequent_tags(metadata)) or None


def frequent_tags(metadata: Mapping[str, str], most: int = _MAX_TAGS) -> dict[str, int]:
    """Return the most frequent tags of the training images, with their counts."""
    count: Counter[str] = Counter()
    folders = _json(metadata.get("ss_tag_frequency"))
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, number in tags.items() if isinstance(tags, dict) else ():
            if isinstance(tag, str) and type(number) is int and tag.strip():
                count[tag.strip()] += number
    return dict(count.most_common(most))


def _training(metadata: Mapping[str, str]) -> list[str]:
    info = _json(metadata.get("training_info"))
    steps = _first(metadata, "ss_steps") or (str(info.get("step", "")) if isinstance(info, dict) else "")
    found = {
        "steps": steps,
        "images": _first(metadata, "ss_num_train_images"),
        "rank": _first(metadata, "ss_network_dim"),
        "alpha": _first(metadata, "ss_network_alpha"),
    }
    return [f"{name} {value}" for name, value in found.items() if value]


def _first(metadata: Mapping[str, str], *keys: str) -> str:
    return next((metadata[key] for key in keys if metadata.get(key, "") not in _UNSET), "")


def _json(text: str | None) -> object:
    try:
        return json.loads(text) if text and len(text) <= _MAX_JSON else None
    except (ValueError, RecursionError):
        return None
