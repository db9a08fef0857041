"""Choose the kind of a base model, and check examples of an unknown one. Importing this module needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icmlora.base_models.examples.examples import Examples, nothing_usable, parse_examples, parse_for
from icmlora.base_models.examples.forms import READERS
from icmlora.base_models.finding.lookup import FoundBase
from icmlora.base_models.kinds.custom_model import CustomModality
from icmlora.base_models.modality import Modality
from icmlora.errors import BaseModelUnsuited, located


def modality_of(found: FoundBase) -> Modality[Any, Any]:
    """Return the loader's modality, else the first suitable one; raise `BaseModelUnsuited` if there is none."""
    found.refuse_pipeline()
    if found.loader is not None:
        return CustomModality(found.loader)
    from icmlora.base_models.kinds.modalities import MODALITIES  # imports torch

    for known in MODALITIES:
        if known.suits(found):
            return known
    hint = "its tasks can be stored, encoded and materialized; run `icm base add --loader` to measure them too"
    raise BaseModelUnsuited(f"base model {found.label!r} is of a kind that icm cannot run", hint=hint)


def check_examples(data: bytes, *, path: str | Path | None = None, any_row: bool = False) -> Examples:
    """Read examples without knowing the base model: the kind that can read most rows wins.

    Set `any_row` if a base model with a loader is known, because it may read rows of any form. `path` is for messages.

    Raises:
        DataError: No kind can read any of the rows.
    """
    *special, general = parse_for(READERS, data, path=path)
    usable = [examples for examples in special if examples.items]
    if any(not examples.skipped for examples in usable):
        return max(usable, key=len)
    if not general.items and any_row:
        return parse_examples(data, dict, path=path)
    if not general.items and not usable:
        with located(path):
            raise nothing_usable(general)  # the message of the most general reader is the most helpful
    return max([*usable, general], key=len)
