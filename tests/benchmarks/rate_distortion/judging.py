"""The loss of an adapter folder on a task's held-out text: PEFT loads it, and nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import FoundBase, inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.kinds.likelihood import nll
from icmlora.base_models.modality import BaseModel, Score
from icmlora.base_models.running.attach import adapted
from icmlora.formats.peft.peft import WEIGHTS_NAME
from tests.benchmarks.rate_distortion.cache import Cache
from tests.benchmarks.rate_distortion.fleet import FleetFolder

BASE = "base"


@dataclass(frozen=True)
class Settings:
    """How losses are measured.

    Attributes:
        texts: Held-out texts of each task, from the first on; None for all.
        max_tokens: Tokens read of each text.
        dtype: Precision of the base model: "float32" or "bfloat16".
    """

    texts: int | None = None
    max_tokens: int = 256
    dtype: str = "float32"


class Judge:
    """Measures losses; the base model is loaded when the first loss is not in the cache.

    Args:
        base: Folder of the base model.
        fleet: Where the held-out text is.
        settings: How to measure.
        cache: Where losses are kept.
    """

    def __init__(self, base: Path, fleet: FleetFolder, settings: Settings, cache: Cache) -> None:
        self._folder, self._fleet, self._settings, self._cache = base, fleet, settings, cache
        self.measured = 0

    def known(self, task: str, weights: str) -> Score | None:
        """Return the loss of weights that were measured before, by their digest."""
        record = self._cache.get("loss", task, weights, self._how(task))
        if record is None:
            return None
        return Score(record["nats"] / record["tokens"], record["tokens"], record["utf8_bytes"])

    def loss(self, task: str, folder: Path | None) -> Score:
        """Return the loss with an adapter folder, or without an adapter."""
        weights = BASE if folder is None else weights_digest(folder)
        found = self.known(task, weights)
        if found is None:
            found = self._measure(task, folder)
            if not math.isfinite(found.value):
                raise SystemExit(f"the loss of {task} is no number")
            record = {"nats": found.value * found.count, "tokens": found.count, "utf8_bytes": found.utf8_bytes}
            self._cache.add("loss", task, weights, self._how(task), **record)
            self.measured += 1
        return found

    def _measure(self, task: str, folder: Path | None) -> Score:
        examples = self._fleet.texts(task).examples[: self._settings.texts]
        options = {"max_tokens": self._settings.max_tokens}
        if folder is None:
            return nll(self._base.model, self._base.tokenizer, examples, **options)
        with adapted(self._base, folder) as model:
            return nll(model, self._base.tokenizer, examples, **options)

    def _how(self, task: str) -> str:
        s = self._settings
        parts = [s.texts, s.max_tokens, s.dtype, self._fingerprint, self._fleet.texts(task).digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def _found(self) -> FoundBase:
        return inspect_base(next(iter(self._fleet.values())).base_model, self._folder)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_base(self._found)

    @cached_property
    def _base(self) -> BaseModel:
        dtype: torch.dtype = getattr(torch, self._settings.dtype)
        return CausalLM().load(self._found, dtype=dtype, fingerprint=self._fingerprint)


def weights_digest(folder: Path) -> str:
    """Return what names an adapter folder's values."""
    return hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
