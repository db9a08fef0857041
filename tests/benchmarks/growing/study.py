"""A fleet that grows: some tasks, then more at a time, with the originals gone in between.

20 tasks ──train, evict──▶ + 4 ──update, evict──▶ + 4 ... ──▶ after each: every task decoded and measured
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from icmlora import Fleet
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.kinds.likelihood import nll
from icmlora.base_models.modality import BaseModel, retained_gain
from icmlora.base_models.running.attach import adapted
from icmlora.fleet.bases.base_models import add_base_model
from icmlora.fleet.context import Context
from icmlora.fleet.evict.evict import evict
from icmlora.fleet.ingest.ingest import ingest
from icmlora.fleet.resources.loading import open_base
from icmlora.fleet.train.train import train
from icmlora.fleet.train.update import update
from icmlora.fleet.vectors.vectors import extract_vectors

MAX_ERROR = 0.55
"""Relative error up to which an original is evicted."""


@dataclass(frozen=True)
class Stage:
    """The fleet after one training or update."""

    added: tuple[str, ...]
    seconds: float
    """Of that training or update, without measuring and evicting."""
    generator_bytes: int
    code_bytes: int
    """Of all codes."""
    gains: dict[str, float]
    """Retained gain of every task so far."""


class Growing:
    """One run.

    Args:
        context: A store that does not exist yet.
        base_label: The base model's name in the adapters.
        base_folder: Where it is.
        texts: Held-out texts of each task.
        max_tokens: Tokens of each.
        dtype: Of the base model that measures.
    """

    def __init__(
        self, context: Context, base_label: str, base_folder: Path, texts: int, max_tokens: int, dtype: torch.dtype
    ) -> None:
        self._place, self._label, self._base_folder = context, base_label, base_folder
        self._texts, self._max_tokens, self._dtype = texts, max_tokens, dtype
        self._ends: dict[str, tuple[float, float]] = {}
        self._folders: dict[str, Path] = {}

    def run(self, first: Sequence[Path], later: Sequence[Sequence[Path]]) -> Iterator[Stage]:
        """Train on the first tasks, then add the others, some at a time."""
        yield self._stage(first, fresh=True)
        for some in later:
            yield self._stage(some, fresh=False)

    def _stage(self, folders: Sequence[Path], *, fresh: bool) -> Stage:
        self._folders |= {folder.name: folder for folder in folders}
        ingest(self._place, folders, vectors=False)
        if fresh:
            add_base_model(self._place, self._label, self._base_folder)
        extract_vectors(self._place, device="cpu")
        began = time.monotonic()
        if fresh:
            train(self._place, device="cpu", refine=0, evaluate=False)
        else:
            update(self._place, device="cpu", refine=0, evaluate=False)
        seconds = time.monotonic() - began
        names = tuple(folder.name for folder in folders)
        report = evict(self._place, names, max_error=MAX_ERROR, device="cpu")
        kept = [task.task for task in report.done if task.status != "evicted"]
        if kept:
            raise SystemExit(f"not evicted: {', '.join(kept)}")
        return self._measured(names, seconds)

    def _measured(self, names: tuple[str, ...], seconds: float) -> Stage:
        with self._place.open(read_only=True) as store:
            base = open_base(store, self._label, torch.device("cpu"), self._dtype, cache=self._place.cache)
            generator = store.generator(self._label)
            assert generator is not None
            gains = {}
            for name, folder in self._folders.items():
                if name not in self._ends:
                    self._ends[name] = self._nats(base, None, folder), self._nats(base, folder, folder)
                decoded = self._place.path.parent / "decoded"
                Fleet(self._place.path).materialize(name, decoded, source="code", force=True)
                gain = retained_gain(*self._ends[name], self._nats(base, decoded, folder))
                assert gain is not None
                gains[name] = gain
            codes = sum(row.code_size or 0 for row in store.rows())
            return Stage(names, seconds, generator.size, codes, gains)

    def _nats(self, base: BaseModel, adapter: Path | None, folder: Path) -> float:
        examples = parse_examples((folder / "eval.jsonl").read_bytes())[: self._texts]
        if adapter is None:
            return nll(base.model, base.tokenizer, examples, max_tokens=self._max_tokens).value
        with adapted(base, adapter) as model:
            return nll(model, base.tokenizer, examples, max_tokens=self._max_tokens).value
