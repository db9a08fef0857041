"""Update the ranks in the header of a single-file adapter.

    ss_network_dim      the rank; "Dynamic" if modules have several, as sd-scripts' own resizing writes it
    ss_network_alpha    alpha of the modules; updated with the rank if the file has no alphas
    ss_network_args     more ranks, such as ranks of convolutions: removed if no longer valid
    sshs_model_hash ... digests of the old tensors: removed

All other notes are unchanged: title, trigger words, tags.

Source: kohya-ss/sd-scripts, networks/resize_lora.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

DYNAMIC = "Dynamic"
_DIGESTS = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
_RANKS = frozenset({"conv_dim", "block_dims", "conv_block_dims"})
_ALPHAS = frozenset({"conv_alpha", "block_alphas", "conv_block_alphas"})


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
