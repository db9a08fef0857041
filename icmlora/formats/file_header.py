"""The header of a single-file adapter: a trainer's notes, for display, and its ranks, which change with the tensors.

    ss_network_dim      the rank; "Dynamic" if modules have several, as sd-scripts' own resizing writes it
    ss_network_alpha    alpha of the modules; updated with the rank if the file has no alphas
    ss_network_args     more ranks, such as ranks of convolutions: removed if no longer valid
    sshs_model_hash ... digests of the old tensors: removed

All other notes are unchanged: title, trigger words, tags. Header text is untrusted: it is escaped and truncated before
it is shown.

Sources: kohya-ss/sd-scripts (`ss_*`; networks/resize_lora.py), the modelspec standard (`modelspec.*`),
ostris/ai-toolkit (`training_info`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from registry.names import escape

HEADER = "header.metadata"
"""Name of the extra tensor of bytes that holds the header's metadata verbatim."""
DYNAMIC = "Dynamic"
_DIGESTS = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
_RANKS = frozenset({"conv_dim", "block_dims", "conv_block_dims"})
_ALPHAS = frozenset({"conv_alpha", "block_alphas", "conv_block_alphas"})
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


def with_ranks(metadata: Mapping[str, str], ranks: Iterable[int], *, alphas_stay: bool) -> dict[str, str]:
    """Return the metadata of a header for new tensors; missing entries are not added.

    Args:
        metadata: Metadata of the old header.
        ranks: Ranks of all modules.
        alphas_stay: The file keeps its alphas. Otherwise the alpha of each module is its rank.
    """
    found = {name: text for name, text in metadata.items() if name not in _DIGESTS}
    stated = _stated(ranks)
    if "ss_network_dim" in found:
        found["ss_network_dim"] = stated
    if "ss_network_alpha" in found and not alphas_stay:
        found["ss_network_alpha"] = stated
    if "ss_network_args" in found:
        found["ss_network_args"] = _without(found["ss_network_args"], _RANKS if alphas_stay else _RANKS | _ALPHAS)
    return found


def of_lora(metadata: Mapping[str, str], ranks: Iterable[int]) -> dict[str, str]:
    """Return the metadata of a header for LoRA with alpha = r in kohya's naming, from any trainer's metadata."""
    stated = _stated(ranks)
    found = with_ranks(metadata, (), alphas_stay=False)
    found.pop("ss_network_args", None)  # valid only for the old network
    return found | {"ss_network_module": "networks.lora", "ss_network_dim": stated, "ss_network_alpha": stated}


def _stated(ranks: Iterable[int]) -> str:
    different = set(ranks)
    return str(different.pop()) if len(different) == 1 else DYNAMIC


def _without(text: str, names: frozenset[str]) -> str:
    """Return a JSON object without some entries; other text is unchanged."""
    try:
        fields = json.loads(text)
    except ValueError:
        return text
    if not isinstance(fields, dict) or not names & fields.keys():
        return text
    return json.dumps({name: value for name, value in fields.items() if name not in names})
