"""What the header of an adapter in a single file says of its ranks, and how it stays true when they change.

    ss_network_dim      the rank, "Dynamic" where modules have several, as sd-scripts' own resizing writes it
    ss_network_alpha    what the alphas of the modules are; goes with the rank where the file has no alphas
    ss_network_args     more ranks, such as those of convolutions: taken out where they are true no longer
    sshs_model_hash ... digests of tensors that the file does not have any more

All else that a trainer noted stays as it is: title, trigger words, tags.

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
    """Return the metadata of a header for new tensors; what is not stated is not added.

    Args:
        metadata: That of the old header.
        ranks: Those of all modules.
        alphas_stay: The file has the same alphas as before. Otherwise the alpha of each module is its rank.
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
    """Return the metadata of a header for LoRA with alpha = r in kohya's naming, whatever trained it."""
    stated = _stated(ranks)
    found = with_ranks(metadata, (), alphas_stay=False)
    found.pop("ss_network_args", None)  # of another network
    return found | {"ss_network_module": "networks.lora", "ss_network_dim": stated, "ss_network_alpha": stated}


def _stated(ranks: Iterable[int]) -> str:
    different = set(ranks)
    return str(different.pop()) if len(different) == 1 else DYNAMIC


def _without(text: str, names: frozenset[str]) -> str:
    """Take entries out of a JSON object; what is none stays."""
    try:
        fields = json.loads(text)
    except ValueError:
        return text
    if not isinstance(fields, dict) or not names & fields.keys():
        return text
    return json.dumps({name: value for name, value in fields.items() if name not in names})
