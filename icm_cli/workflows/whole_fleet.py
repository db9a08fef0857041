"""Every task of a base model as an adapter, whatever the store has of it: its original, or what stands in for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from icm_cli.workflows.beside import decode_rung
from icm_cli.workflows.plain_copy import read_original
from icmlora.adapter import Adapter
from icmlora.errors import DataError
from icmlora.evaluation import Scored, tokenized
from icmlora.examples import parse_examples, spread
from icmlora.generator.lineage import Lineage
from registry.records import GeneratorRecord

if TYPE_CHECKING:
    from registry.store import Store


class WholeFleet:
    """The tasks of one base model, evicted ones included (see `icmlora.adaptation.meta_training.EpisodeFleet`).

    Rows are in memory, adapters are not. What a start made is not among them: it would only confirm that start.

    Args:
        store: The open store.
        generator: The current generator.
        lineage: Its file, which decodes what was evicted.
    """

    def __init__(self, store: Store, generator: GeneratorRecord, lineage: Lineage) -> None:
        self._store, self._generator, self._lineage = store, generator, lineage
        rows = [row for row in store.summaries() if row.task.base_model == generator.base_model]
        self._rows = [row for row in rows if not row.final.is_generated]
        self.names = [row.task.name for row in self._rows]

    def __iter__(self) -> Iterator[Adapter]:
        """Read all adapters, one after the other."""
        return (self.load(task) for task in range(len(self._rows)))

    def load(self, task: int) -> Adapter:
        """Read the original of a task, or decode what stands in for it.

        Raises:
            DataError: It has neither.
        """
        row = self._rows[task]
        if not row.final.is_evicted:
            return read_original(self._store, row.final)
        code = self._store.code(row.task.name, self._generator.id)
        if code is None:
            raise DataError(f"task {row.task.name!r} has neither an original nor a code", hint="`icm verify` says more")
        return decode_rung(self._store, self._lineage, code, code.rung)

    def samples(self, task: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int, most: int) -> Sequence[Scored]:
        """Return some of a task's samples as token ids, spread evenly over them; none where it has no samples.

        Args:
            task: Which task.
            tokenizer: The base model's.
            max_tokens: Tokens read of a sample.
            most: Samples: a file may hold a hundred thousand.
        """
        digest = self._rows[task].task.samples
        if digest is None:
            return ()
        some = spread(parse_examples(self._store.read_blob(digest)), most)
        try:
            return tokenized(tokenizer, some, max_tokens)
        except DataError:
            return ()  # single letters: nothing to predict
